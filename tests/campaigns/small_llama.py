"""`make small-llama`: trains a small Llama from nothing, so that there is a model whose weights were never rounded.

What can be had without a hub's account often comes in 4 bits already: methods that know that grid get back what the
weights were. This one has 21 million weights in float32, trained by AdamW with bfloat16 products, and is stored in
bfloat16. Its channels are multiples of 256, so that llama.cpp's formats take every layer. `make four-bits
ARGS="--model DIR"` measures on it.

    python -m tests.campaigns.small_llama DIR --texts FILE [FILE ...] [--minutes 60] [--seed 0]

Texts are plain, in UTF-8; documents are separated by a form feed. What `loradock optimize` evaluates on must not be
among them; the calibration half of its default text is added. The learning rate falls with the time, so a run ends
when it said, with what this machine could do in that time.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimize.data import text
from tests.campaigns.cpu_speed import processor

VOCABULARY, ROWS, TOKENS = 4096, 8, 256
PEAK, WARM = 2e-3, 100  # learning rate, steps until it is reached
END = "<|endoftext|>"


def words(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    default = text.default()
    files = [file.read_text() for file in given.texts]
    documents = [part for file in files for part in file.split("\f")] + list(default["calibration"])
    given.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = words(documents[:: max(1, len(documents) // 4000)])
    tokenizer.save_pretrained(given.folder)
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for row in rows for token in (0, *row)], dtype=torch.int32)
    held = torch.tensor(text.windows(tokenizer, default["evaluation"], 8, 2 * TOKENS, 0))
    learner = model()
    digest = hashlib.sha256("".join(documents).encode()).hexdigest()[:12]
    count = sum(map(torch.numel, learner.parameters()))
    print(f"{processor()}; {count:,} weights; {len(ids):,} tokens of text, sha256 {digest}", flush=True)
    decayed = [weight for weight in learner.parameters() if weight.dim() > 1]
    plain = [weight for weight in learner.parameters() if weight.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    begun, step, shown = time.monotonic(), 0, 0.0
    while (passed := (time.monotonic() - begun) / (60 * given.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / WARM) * (1 - passed)
        starts = torch.randint(len(ids) - TOKENS, (ROWS,))
        batch = torch.stack([ids[start : start + TOKENS] for start in starts]).long()
        loss = _loss(learner, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            with torch.no_grad():
                kept = _loss(learner, held).item()
            seen = step * ROWS * TOKENS
            print(f"{passed:.0%}, {seen:,} tokens: loss {loss.item():.2f}, held out {kept:.3f}", flush=True)
    with torch.no_grad():
        print(f"held out {_loss(learner, held).item():.4f} nats a token", flush=True)
    learner.bfloat16().save_pretrained(given.folder)


def _loss(learner: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = learner.model(input_ids=batch, use_cache=False).last_hidden_state
        scores = learner.lm_head(hidden[:, :-1])
    return torch.nn.functional.cross_entropy(scores.float().flatten(0, 1), batch[:, 1:].flatten())


if __name__ == "__main__":
    main()
