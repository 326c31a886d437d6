"""Small GGUF files, as llama.cpp's converter lays them out, with weights in any of ggml's types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, HEADS, KEYS, HEAD, LAYERS = 256, 512, 8, 2, 32, 2
WORDS = [*(chr(33 + i) for i in range(90)), "Ġ", "Ġa", "ab", "<|end|>", "<|user|>", "ba"]
MERGES = ["Ġ a", "a b", "b a"]


def blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Rows of quantized blocks of any content, with scales of a weight's size."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    # Scales are halves at the beginning of a block, or at its end in Q6_K; two of them in these.
    scale = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    name = kind.name
    raw[..., -2:] = scale if name in ("Q6_K", "Q3_K") else raw[..., -2:]
    if name not in ("Q6_K", "Q3_K", "Q2_K"):
        raw[..., :2] = scale
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        raw[..., 2:4] = scale
    if name == "Q2_K":
        raw[..., -4:] = np.concatenate([scale, scale])
    return raw.reshape(shape[0], -1)


def tensors(family: str, random: np.random.Generator) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a model of this family."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(WORDS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    fused = family == "phi3"
    for layer in range(LAYERS):
        one: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_output": (HIDDEN, HEADS * HEAD),
            "ffn_down": (HIDDEN, INNER),
            "ffn_up": (2 * INNER if fused else INNER, HIDDEN),
        }
        if fused:
            one["attn_qkv"] = ((HEADS + 2 * KEYS) * HEAD, HIDDEN)
        else:
            one |= {"ffn_gate": (INNER, HIDDEN), "attn_q": (HEADS * HEAD, HIDDEN)}
            one |= {"attn_k": (KEYS * HEAD, HIDDEN), "attn_v": (KEYS * HEAD, HIDDEN)}
        if family in ("qwen3", "gemma3"):
            one |= {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
        if family == "gemma3":
            one |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in one.items()}
        if family == "qwen2":
            for name, size in (("q", HEADS), ("k", KEYS), ("v", KEYS)):
                shapes[f"blk.{layer}.attn_{name}.bias"] = (size * HEAD,)
    return shapes


def write(
    path: Path,
    family: str = "llama",
    kind: str = "Q8_0",
    seed: int = 0,
    extra: dict[str, Any] | None = None,
    resized: dict[str, tuple[int, ...]] | None = None,
    rule: str = "gpt-2",
    context: int = 256,
) -> Path:
    """A model of random weights. extra: numbers and texts for its metadata, by key."""
    random = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, family)
    out.add_block_count(LAYERS)
    out.add_context_length(context)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KEYS)
    out.add_layer_norm_rms_eps(1e-6)
    if family in ("qwen3", "gemma3"):
        out.add_key_length(HEAD)
        out.add_value_length(HEAD)
    if family == "gemma3":
        out.add_sliding_window(64)
    if family == "granite":
        for key, value in (
            ("attention.scale", 0.02),
            ("embedding_scale", 12.0),
            ("residual_scale", 0.2),
            ("logit_scale", 8.0),
        ):
            out.add_float32(f"granite.{key}", value)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(rule)
    out.add_token_list(WORDS)
    out.add_token_types([3 if word.startswith("<|") else 1 for word in WORDS])
    out.add_token_merges(MERGES)
    out.add_eos_token_id(WORDS.index("<|end|>"))
    out.add_pad_token_id(WORDS.index("<|end|>"))
    out.add_chat_template("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}")
    for key, value in (extra or {}).items():
        (out.add_string if isinstance(value, str) else out.add_float32)(key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, shape in (tensors(family, random) | (resized or {})).items():
        if len(shape) == 1 or kind in ("F32", "F16"):
            made = random.normal(1 if name.endswith("norm.weight") else 0, 0.05, shape).astype(
                np.float16 if kind == "F16" and len(shape) > 1 else np.float32
            )
            out.add_tensor(name, made)
        else:
            assert len(shape) == 2
            out.add_tensor(name, blocks(quantized, shape, random), raw_dtype=quantized)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
