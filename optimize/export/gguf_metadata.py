"""What a GGUF file says beside its weights, by llama.cpp's keys: sizes, rotation, tokenizer, chat template.

Keys: llama.cpp's `gguf-py/gguf/constants.py`; rules that cut text: its `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError

# By transformers' class: llama.cpp's architecture, and whether it has rotary pairs side by side.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
NORMAL = 1
CONTROL = 3
USER = 4
UNUSED = 5
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT = r"\p{N}"
# llama.cpp's names for the expressions that cut text, one after the other.
RULES = {
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",): "qwen2",
    (DIGIT, GPT2): "smollm",
    (GPT2,): "gpt-2",
}


def reason_against(config: Mapping[str, Any], tokenizer: Path) -> str:
    """Why a model cannot become a GGUF file here; "" where it can."""
    name = (config.get("architectures") or [""])[0]
    if name not in ARCHITECTURES:
        return f"a GGUF file is written of {', '.join(ARCHITECTURES)}, not of {name}"
    scaling = _scaling(config)
    if scaling.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"the model's rope is {scaling['rope_type']!r}; default, linear and llama3 are written"
    try:
        _rule(json.loads(tokenizer.read_text()))
    except (OSError, ValueError, OptimizeError) as error:
        return f"its tokenizer is not written: {error}"
    return ""


def write(out: Any, config: Mapping[str, Any], folder: Path) -> None:
    """All of it, into a `gguf.GGUFWriter`."""
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    out.add_block_count(int(config["num_hidden_layers"]))
    out.add_context_length(int(config["max_position_embeddings"]))
    out.add_embedding_length(int(config["hidden_size"]))
    out.add_feed_forward_length(int(config["intermediate_size"]))
    out.add_head_count(heads)
    out.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_rope_dimension_count(head)
    out.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    out.add_vocab_size(int(config["vocab_size"]))
    scaling = _scaling(config)
    out.add_rope_freq_base(float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    if scaling.get("rope_type") == "linear":
        out.add_string(f"{out.arch}.rope.scaling.type", "linear")
        out.add_rope_scaling_factor(float(scaling["factor"]))
    if scaling.get("rope_type") == "llama3":
        out.add_tensor("rope_freqs.weight", _llama3(scaling, config, head))
    _words(out, config, folder)


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    read = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in read:
        read.setdefault("rope_type", read["type"])
    return read


def _llama3(scaling: Mapping[str, Any], config: Mapping[str, Any], head: int) -> Any:
    """By what each frequency is divided (transformers' `_compute_llama3_parameters`)."""
    import numpy as np

    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    frequencies = base ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / float(scaling["factor"]) + share), np.float32)


def _words(out: Any, config: Mapping[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    read = json.loads((folder / "tokenizer.json").read_text())
    words = {number: word for word, number in read["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    for added in read.get("added_tokens", ()):
        words[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    size = range(int(config["vocab_size"]))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(_rule(read))
    out.add_token_list([words.get(number, f"[PAD{number}]") for number in size])
    out.add_token_types([kinds.get(number, UNUSED) for number in size])
    merges = read["model"]["merges"]
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(out, f"add_{name}_token_id")(number)
    bos = tokenizer.bos_token_id
    out.add_add_bos_token(bos is not None and tokenizer("a").input_ids[:1] == [bos])
    if isinstance(tokenizer.chat_template, str):
        out.add_chat_template(tokenizer.chat_template)


def _rule(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts text."""
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise OptimizeError("it is no byte-level BPE")
    cuts = tokenizer.get("pre_tokenizer") or {}
    found: list[str] = []
    for part in cuts.get("pretokenizers", [cuts]):
        if part.get("type") == "Split":
            found.append(part["pattern"].get("Regex", part["pattern"].get("String", "")))
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            found.append(DIGIT)
        elif part.get("type") == "ByteLevel" and part.get("use_regex", True):
            found.append(GPT2)
        elif part.get("type") != "ByteLevel":
            raise OptimizeError(f"it cuts text by {part.get('type')}")
    rule = RULES.get(tuple(expression.removesuffix(r"|\s+") if expression.startswith("'s") else expression
                           for expression in found))  # fmt: skip
    if rule is None:
        raise OptimizeError("it cuts text by a rule that llama.cpp has no name for here")
    return rule
