"""Small GGUF files, as llama.cpp's converter lays them out, with weights in any of ggml's types."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from serve.models.gguf.kept import SCALES

HIDDEN, INNER, HEADS, KEYS, HEAD, LAYERS = 256, 512, 8, 2, 32, 2
WORDS = [*(chr(33 + i) for i in range(90)), "Ġ", "Ġa", "ab", "<|end|>", "<|user|>", "ba"]
MERGES = ["Ġ a", "a b", "b a"]


def blocks(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, int], random: np.random.Generator, size: float = 1.0
) -> np.ndarray:
    """Rows of quantized blocks of any content, with scales of a weight's size, or so many times as large."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
    # Scales are halves at the beginning of a block, or at its end in Q6_K; two of them in these.
    name = kind.name
    scale = np.frombuffer(np.float16(size * (0.0002 if name.endswith("_K") else 0.004)).tobytes(), np.uint8)
    raw[..., -2:] = scale if name in ("Q6_K", "Q3_K") else raw[..., -2:]
    if name not in ("Q6_K", "Q3_K", "Q2_K"):
        raw[..., :2] = scale
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        raw[..., 2:4] = scale
    if name == "Q2_K":
        raw[..., -4:] = np.concatenate([scale, scale])
    return raw.reshape(shape[0], -1)


def scaled_blocks(kind: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """The same with another scale in each block, of either sign, and none in one of them."""
    number = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[number][1]
    raw = blocks(number, shape, random).reshape(-1, size)
    for at in SCALES[kind]:
        scales = random.normal(0, 0.004, len(raw)).astype(np.float16)
        scales[0] = 0
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(shape[0], -1)


def packed_blocks(
    parts: list[tuple[str, np.ndarray]],
    outputs: int,
    inputs: int,
    bias: Any = None,
    paired: bool = False,
    kernels: ctypes.CDLL | None = None,
) -> int:
    """The number of the kernels' matrix of these tensors' rows; -1 where it cannot be."""
    from serve.cpu_kernels import build, packing

    count = len(parts)
    kernels = kernels or build.library()
    assert kernels is not None
    return int(
        kernels.loradock_matrix_ggml(
            (ctypes.c_void_p * count)(*(raw.ctypes.data for _, raw in parts)),
            (ctypes.c_int * count)(*(int(gguf.GGMLQuantizationType[kind]) for kind, _ in parts)),
            (ctypes.c_int * count)(*(len(raw) for _, raw in parts)),
            count,
            outputs,
            inputs,
            packing.at(bias),
            int(paired),
        )
    )


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
    kinds: dict[str, str] | None = None,
    size: float = 1.0,
) -> Path:
    """A model of random weights. extra: numbers and texts for its metadata. kinds: of tensors, by their endings. size:
    of the weights; the model's attention is so sharp that a rounding decides what a token looks at, unless it is small.
    """
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
    for name, shape in (tensors(family, random) | (resized or {})).items():
        own = next((other for ending, other in (kinds or {}).items() if name.endswith(ending)), kind)
        quantized = gguf.GGMLQuantizationType[own]
        if len(shape) == 1 or own in ("F32", "F16"):
            made = random.normal(1 if name.endswith("norm.weight") else 0, 0.05, shape).astype(
                np.float16 if own == "F16" and len(shape) > 1 else np.float32
            )
            out.add_tensor(name, made)
        else:
            assert len(shape) == 2
            out.add_tensor(name, blocks(quantized, shape, random, size), raw_dtype=quantized)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def adapter(
    path: Path, peft: Path, heads: dict[str, int] | None = None, family: str = "llama", **metadata: Any
) -> Path:
    """A PEFT folder's adapter as llama.cpp's `convert_lora_to_gguf.py` writes it.

    heads: of queries and keys, where their rows change places. metadata: further keys, with _ for each dot.
    """
    from safetensors.numpy import load_file

    config = json.loads((peft / "adapter_config.json").read_text())
    out = gguf.GGUFWriter(path, family)
    out.add_type("adapter")
    for key, value in ({"adapter_type": "lora"} | metadata).items():
        out.add_string(key.replace("_", "."), value)
    out.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for name, values in load_file(peft / "adapter_model.safetensors").items():
        layers, _, rest = name.removeprefix("base_model.model.model.layers.").partition(".")
        module, half = rest.removesuffix(".weight").rsplit(".lora_", 1)
        count = (heads or {}).get(module.rpartition(".")[2])
        if half == "B" and count:  # llama.cpp's `permute`, of an update as of a weight
            values = values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        out.add_tensor(f"blk.{layers}.{GGUF_NAMES[module]}.weight.lora_{half.lower()}", np.ascontiguousarray(values))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
