"""A Llama of random weights, made on the spot, and adapters that make it say one word, whatever it is asked.

Nothing is trained and nothing fetched: the base's embeddings share one direction, which an adapter's A reads in the
last layer, and its B turns into the word's row of the output layer. The word wins by far, so that no rounding of a
GPU's kernels changes an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.lora import WORDS
from tests.support.pico import WORDS as OTHERS

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD = 512, 4, 8, 4, 64
SHARED = 8.0  # how far each embedding goes in the one direction, its own length being 1
SAID = 64.0  # how far a word's row is gone in
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> Any:
    """A few dozen words; all others are one more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<end>", "<unk>", *WORDS, *dict.fromkeys(OTHERS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>", unk_token="<unk>", pad_token="<end>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def base(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, tie_word_embeddings=False,
        max_position_embeddings=4096, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    ))  # fmt: skip
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.normal_(std=HIDDEN**-0.5)
        embedding[:, 0] += SHARED
        head.normal_(std=HIDDEN**-0.5)
        head[:, 0] = 0  # nor does the shared direction say anything by itself
        head[len(words) :] = 0
        head[:2] = 0
    model.bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def adapter(model: Path, word: str, folder: Path) -> Path:
    """One that says `word`."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    number = tokenizer().convert_tokens_to_ids(word)
    last = f"model.layers.{LAYERS - 1}.self_attn"
    out, row = weights[f"{last}.o_proj.weight"].float(), weights["lm_head.weight"][number].float()
    # Heads that share a value add up what they make of it.
    shared = out.view(HIDDEN, KV_HEADS, HEADS // KV_HEADS, HEAD).sum(2).flatten(1)
    turned = torch.linalg.lstsq(shared, row[:, None]).solution
    down = torch.zeros(8, HIDDEN)
    down[0, 0] = 1.0
    up = torch.zeros(KV_HEADS * HEAD, 8)
    up[:, :1] = turned / (shared @ turned).norm() * SAID
    folder.mkdir(parents=True)
    prefix = f"base_model.model.{last}.v_proj"
    save_file(
        {f"{prefix}.lora_A.weight": down.bfloat16(), f"{prefix}.lora_B.weight": up.bfloat16()},
        folder / "adapter_model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
