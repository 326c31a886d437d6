"""Log-probabilities of prompts beside streams with adapters on `lm_head`, against those that each request gets alone.

    python -m tests.campaigns.prompt_rows OUT.json FOLDER

One engine in this process with a small random model and two adapters, 20 seconds. Writes for each request how far its
prompt's log-probabilities lie from a quiet run's at most, and how far the adapters' lie from the base's.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 333
LENGTHS = (2, 3, 4, 5, 40, 13, 140, 7, 17, 3, 64, 5)


def model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1, tie_word_embeddings=False))
    made.to(torch.bfloat16).save_pretrained(folder / "model")
    return folder / "model"


def adapter(base: Path, folder: Path, rank: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(rank)
    tuned: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "lm_head"]),
    )
    for key, weight in tuned.named_parameters():
        if "lora_" in key:
            weight.data.normal_(std=0.15)
    tuned.save_pretrained(folder)
    return folder


def prompt_values(answer: Any) -> list[float]:
    rows = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
    return [row[token].logprob for token, row in rows]


def main(out: Path, folder: Path) -> None:
    from serve.models.hardware import cpu_environment
    from serve.server.launch import IN_PROCESS

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    base = model(folder)
    loras = [LoRARequest(f"a{rank}", rank, str(adapter(base, folder / f"a{rank}", rank))) for rank in (3, 8)]
    llm: Any = LLM(
        str(base),
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=96,
        max_num_seqs=32,
        kv_cache_memory_bytes=1 << 26,
        enable_lora=True,
        # As many as there are adapters: vLLM's own path is to give the last one to nobody else.
        max_loras=2,
        max_lora_rank=8,
        enable_prefix_caching=False,
        distributed_executor_backend=IN_PROCESS,
    )
    dice = random.Random(0)
    prompts = [TokensPrompt(prompt_token_ids=[dice.randrange(VOCABULARY) for _ in range(n)]) for n in LENGTHS]
    common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    scored = SamplingParams(max_tokens=2, prompt_logprobs=1, **common)
    streamed = SamplingParams(max_tokens=40, **common)

    def ask(prompts: list[Any], params: Any, chosen: list[Any]) -> list[Any]:
        return list(llm.generate(prompts, params, lora_request=chosen, use_tqdm=False))

    chosen = [None if number % 2 == 0 else loras[number // 2 % 2] for number in range(len(prompts))]
    quiet = [prompt_values(ask([prompt], scored, [lora])[0]) for prompt, lora in zip(prompts, chosen, strict=True)]
    plain = prompt_values(ask([prompts[5]], scored, [None])[0])
    streams = [*loras, *loras, None]
    beside = [TokensPrompt(prompt_token_ids=[5, number + 1]) for number in range(len(streams))]
    answers = ask([*beside, *prompts], [*[streamed] * len(beside), *[scored] * len(prompts)], [*streams, *chosen])[
        len(beside) :
    ]
    apart = {
        f"{number}: {len(before) + 1} tokens, {lora.lora_name if lora else 'base'}": max(
            abs(one - other) for one, other in zip(before, prompt_values(answer), strict=True)
        )
        for number, (before, answer, lora) in enumerate(zip(quiet, answers, chosen, strict=True))
    }
    between = max(abs(one - other) for one, other in zip(plain, quiet[5], strict=True))
    out.write_text(json.dumps({"apart": apart, "adapters apart": between}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
