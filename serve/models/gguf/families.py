"""Model families as GGUF files have them: the config that transformers and vLLM read, and each weight's name there.

What llama.cpp's converter changed is changed back: the order of rotary halves in `llama` and `granite`, 1 added to
Gemma's norms. A file that says something of the computation that is not read here is refused, not served wrong.
Keys and tensors: llama.cpp's `gguf-py/gguf/constants.py` and `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import ConfigError
from serve.models.gguf.file import GGUF, Tensor

BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What is made of such a tensor goes into the config.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_PARTS = PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Keys below the family's name that every family may have. Others that are there and not read are an error.
COMMON = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
)
SCALING = tuple(
    f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "attn_factor", "finetuned")
)


@dataclass(frozen=True, slots=True)
class Family:
    """One of llama.cpp's architectures. `fused`: queries, keys and values are one matrix, gates and inputs another."""

    model_type: str
    architecture: str
    turned: bool = False  # queries and keys have rotary pairs side by side
    norms_up: float = 0.0  # what was added to norms
    fused: bool = False
    head_norms: bool = False
    parts: Mapping[str, str] = field(default_factory=lambda: PARTS)
    keys: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", turned=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", head_norms=True),
    "gemma3": Family(
        *("gemma3_text", "Gemma3ForCausalLM"),
        norms_up=1.0,
        head_norms=True,
        parts=GEMMA_PARTS,
        keys=("attention.sliding_window",),
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", fused=True, keys=("attention.sliding_window",)),
    "granite": Family(
        *("granite", "GraniteForCausalLM"),
        turned=True,
        keys=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    ),
}
GEMMA_LOCAL_BASE, GEMMA_PATTERN = 10_000.0, 6


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file becomes: the config, and for each tensor its name in the checkpoint."""

    family: Family
    config: dict[str, Any]
    names: Mapping[str, str]

    def put_back(self, tensor: Tensor, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values that the checkpoint had before it was converted. values: (outputs, inputs), or (outputs,)."""
        values = self.rows_back(tensor.name, values)
        if self.family.norms_up and tensor.name.endswith("norm.weight"):
            return values - np.float32(self.family.norms_up)
        return values

    def rows_back(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """A tensor's rows in the checkpoint's order, whatever is in them."""
        part = _part(name)
        if not self.family.turned or part not in ("attn_q", "attn_k"):
            return rows
        heads = self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return pairs_apart(rows, heads)


def pairs_apart(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of queries or keys whose rotary pairs lie side by side, with the halves of each head apart."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def peft_module(tensor: str, family: Family) -> str:
    """The module whose weight a tensor is, by its name in the checkpoint."""
    return _name(tensor, family).removesuffix(".weight")


def plan(file: GGUF) -> Plan:
    """ConfigError: the family is not known, something is missing, or says what is not understood here."""
    name = file.text("general.architecture")
    family = FAMILIES.get(name)
    if family is None:
        raise ConfigError(
            f"{file.path.name} is a model of the architecture {name!r}: from a GGUF file "
            f"{', '.join(FAMILIES)} can be served; serve its original checkpoint"
        )
    _known(file, name, family)
    config = _config(file, name, family)
    names = {tensor: _name(tensor, family) for tensor in file.tensors if tensor not in FACTORS}
    _check_shapes(file, family, config, names)
    return Plan(family, config, names)


def _known(file: GGUF, name: str, family: Family) -> None:
    known = {*COMMON, *SCALING, *family.keys}
    for key in file.metadata:
        below = key.removeprefix(f"{name}.")
        if below != key and below not in known:
            raise ConfigError(
                f"{file.path.name} says {key}, which is not understood here: serve its original checkpoint"
            )


def _config(file: GGUF, name: str, family: Family) -> dict[str, Any]:
    hidden, heads = file.whole(f"{name}.embedding_length"), file.whole(f"{name}.attention.head_count")
    head = file.whole(f"{name}.attention.key_length", max(1, hidden // heads))
    if file.metadata.get(f"{name}.attention.value_length", head) != head:
        raise ConfigError(f"{file.path.name} has values of another length than keys: serve its original checkpoint")
    words = file.tensors.get("token_embd.weight")
    if words is None:
        raise ConfigError(f"{file.path.name} has no token_embd.weight: it is an adapter, or one part of a model")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": words.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.whole(f"{name}.feed_forward_length"),
        "num_hidden_layers": file.whole(f"{name}.block_count", most=1000),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole(f"{name}.attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": file.whole(f"{name}.context_length"),
        "rms_norm_eps": _rounded(file.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": file.number(f"{name}.rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        **family.fixed,
    }
    for which, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{which}_token_id"] = number if isinstance(number, int) and 0 <= number < words.shape[0] else None
    biases = "blk.0.attn_q.bias" in file.tensors
    if family.model_type in ("llama", "granite", "qwen3"):
        config["attention_bias"] = biases
        if "blk.0.attn_output.bias" in file.tensors and not biases:
            raise ConfigError(f"{file.path.name} has a bias at attention's output alone: serve its original checkpoint")
    scaling = _scaling(file, name, config)
    if scaling:
        config["rope_scaling"] = scaling
    _of_the_family(file, name, config)
    return config


def _of_the_family(file: GGUF, name: str, config: dict[str, Any]) -> None:
    """Add what only one of them has."""
    rotary = file.whole(f"{name}.rope.dimension_count", config["head_dim"])
    if name == "phi3":
        config["partial_rotary_factor"] = rotary / config["head_dim"]
        config["original_max_position_embeddings"] = file.whole(
            f"{name}.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        window = file.whole(f"{name}.attention.sliding_window", config["max_position_embeddings"])
        config["sliding_window"] = window if window < config["max_position_embeddings"] else None
        config.pop("head_dim")  # phi3's is always hidden / heads
    elif rotary != config["head_dim"]:
        raise ConfigError(
            f"{file.path.name} turns {rotary} of {config['head_dim']} numbers of a head: not known of {name}"
        )
    if name == "granite":
        config |= {
            "attention_multiplier": file.number(f"{name}.attention.scale", config["head_dim"] ** -0.5),
            "embedding_multiplier": file.number(f"{name}.embedding_scale", 1.0),
            "residual_multiplier": file.number(f"{name}.residual_scale", 1.0),
            "logits_scaling": file.number(f"{name}.logit_scale", 1.0),
        }
        config.pop("head_dim")
    if name == "gemma3":
        layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        # The 27B alone scales by its width, as llama.cpp knows by its 62 layers.
        config["query_pre_attn_scalar"] = hidden // heads if layers == 62 else config["head_dim"]
        config["sliding_window"] = file.whole(f"{name}.attention.sliding_window")
        config["rope_local_base_freq"] = GEMMA_LOCAL_BASE
        config["layer_types"] = [
            "full_attention" if (layer + 1) % GEMMA_PATTERN == 0 else "sliding_attention" for layer in range(layers)
        ]
        config.pop("hidden_act")


def _scaling(file: GGUF, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """transformers' `rope_scaling`."""
    key = f"{name}.rope.scaling"
    kind = file.metadata.get(f"{key}.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3(values(file.tensors["rope_freqs.weight"]), config, file)
    if "rope_factors_long.weight" in file.tensors:
        long, short = (file.tensors.get(f"rope_factors_{which}.weight") for which in ("long", "short"))
        if long is None or short is None:
            raise ConfigError(f"{file.path.name} has rope_factors_long and no rope_factors_short")
        return {"type": "longrope", "long_factor": values(long).tolist(), "short_factor": values(short).tolist()}
    if kind == "none":
        return None
    factor = file.number(f"{key}.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.whole(f"{key}.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ConfigError(f"{key}.type of {file.path.name} is {kind!r}: none, linear, yarn and factors are read")


def _llama3(factors: NDArray[np.float32], config: Mapping[str, Any], file: GGUF) -> dict[str, Any] | None:
    """Llama 3.1's and 3.2's scaling, which the file has as a factor for each frequency.

    The formula: transformers' `_compute_llama3_parameters`. Its other numbers are 1, 4 and 8,192 in every release.
    """
    if np.all(factors == 1):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head = config["head_dim"]
    frequencies = config["rope_theta"] ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    turns = 8192 * frequencies / (2 * math.pi)
    between = (1 - np.clip((turns - 1) / 3, 0, 1)) / scaling["factor"] + np.clip((turns - 1) / 3, 0, 1)
    if factors.shape != turns.shape or not np.allclose(factors, 1 / between, rtol=1e-3):
        raise ConfigError(f"{file.path.name} scales its frequencies as Llama 3 does not: serve its original checkpoint")
    return scaling


def _check_shapes(file: GGUF, family: Family, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Every tensor that the family has, of the size that the config says, and no other."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes: dict[str, tuple[int, ...]] = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (2 * inner if family.fused else inner, hidden),
        "ffn_down": (hidden, inner),
        "token_embd": (config["vocab_size"], hidden),
        "output": (config["vocab_size"], hidden),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
    }
    for name in names:
        part = _part(name)
        size = sizes.get(part, (hidden,))
        wanted = size[:1] if name.endswith(".bias") else size
        if file.tensors[name].shape != wanted:
            raise ConfigError(
                f"tensor {name!r} of {file.path.name} has the sizes {list(file.tensors[name].shape)}, and the file's "
                f"own metadata says {list(wanted)}"
            )
    missing = {"token_embd.weight", "output_norm.weight"} - names.keys()
    for layer in range(config["num_hidden_layers"]):
        missing |= {f"blk.{layer}.{part}.weight" for part in _parts(family)} - names.keys()
    beyond = [name for name in names if (found := BLOCK.match(name)) and int(found[1]) >= config["num_hidden_layers"]]
    if missing or beyond:
        what = f"lacks the tensor {min(missing)!r}" if missing else f"has a tensor {beyond[0]!r} of a layer too many"
        raise ConfigError(f"{file.path.name} {what}")


def _parts(family: Family) -> set[str]:
    """Of each layer."""
    parts = set(family.parts) - {"attn_q_norm", "attn_k_norm", "attn_qkv"}
    if family.head_norms:
        parts |= {"attn_q_norm", "attn_k_norm"}
    return parts - {"attn_q", "attn_k", "attn_v", "ffn_gate"} | {"attn_qkv"} if family.fused else parts


def _name(tensor: str, family: Family) -> str:
    if tensor in OUTSIDE:
        return OUTSIDE[tensor]
    found = BLOCK.fullmatch(tensor)
    if found is None or found[2] not in family.parts:
        raise ConfigError(f"tensor {tensor!r} is not one of {family.model_type}'s: serve the original checkpoint")
    part = "mlp.gate_up_proj" if family.fused and found[2] == "ffn_up" else family.parts[found[2]]
    return f"model.layers.{int(found[1])}.{part}.{found[3]}"


def _part(tensor: str) -> str:
    found = BLOCK.fullmatch(tensor)
    return found[2] if found else tensor.rpartition(".")[0]


def _rounded(value: float) -> float:
    """A float32 as the decimal that was written: 1e-06 and not 9.999999974752427e-07."""
    return float(np.format_float_scientific(np.float32(value)))


def values(tensor: Tensor, first: int = 0, rows: int | None = None) -> NDArray[np.float32]:
    """The tensor's values, or those of some of its rows: float32, of its shape. Only these bytes are read."""
    from gguf import GGMLQuantizationType, dequantize

    count = tensor.shape[0] if rows is None else min(rows, tensor.shape[0] - first)
    whole = len(tensor.shape) == 1
    each = tensor.nbytes if whole else tensor.nbytes // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin + (0 if whole else first * each))
        raw = np.frombuffer(file.read(each if whole else each * count), np.uint8)
    kind = GGMLQuantizationType(tensor.number)
    plain = {"F32": np.float32, "F16": np.float16}.get(tensor.type)
    if plain is not None:
        made = raw.view(plain).astype(np.float32)
    else:
        made = dequantize(raw.reshape(1 if whole else count, -1), kind)
    return np.ascontiguousarray(made.reshape(tensor.shape if whole else (count, *tensor.shape[1:])), dtype=np.float32)
