"""What a loaded model computes, read from vLLM's modules: the few things in which dense decoders differ.

`read` looks at the modules themselves, not at the model's name. A module tells what it holds, and not what its forward
pass makes of it: `families` has the digests of those that were read, so that no other is taken for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from serve.cpu_kernels import digest, families

_VLLM = "vllm.model_executor.models"
_HF = "transformers.models"
_LAYERS = "vllm.model_executor.layers"

# Where a layer's norms are, by the names of those that it has: before and after attention, before and after the MLP.
# One norm alone is before both, which then get the same input.
BLOCKS = {
    ("input_layernorm", "post_attention_layernorm"): ("input_layernorm", None, "post_attention_layernorm", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ): ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"): (
        None,
        "post_attention_layernorm",
        None,
        "post_feedforward_layernorm",
    ),
    ("input_layernorm",): ("input_layernorm", None, None, None),
}
ATTENTION = {"qkv_proj", "o_proj", "attn", "rotary_emb", "q_norm", "k_norm"}
MLP = {"gate_up_proj", "down_proj", "act_fn"}
DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}

# What becomes of a row before its weight, as step.cpp calls it, and what is added to the weight.
PLAIN = 0
ROUNDED = 1
CENTERED = 2
_FUSED = f"{_VLLM}.transformers.fusers.rms_norm"
NORMS = {
    f"{_LAYERS}.layernorm.RMSNorm": (ROUNDED, 0.0),
    f"{_FUSED}.TPAwareRMSNorm": (ROUNDED, 0.0),
    f"{_LAYERS}.layernorm.GemmaRMSNorm": (PLAIN, 1.0),
    f"{_FUSED}.TPAwareGemmaRMSNorm": (PLAIN, 1.0),
    f"{_VLLM}.commandr.RMSNorm": (PLAIN, 0.0),
    f"{_VLLM}.commandr.LayerNorm": (CENTERED, 0.0),
}
SILU, GELU_TANH = 0, 1


class Unknown(Exception):
    """Why this model goes vLLM's way: a word for the metric, and a sentence."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Norm:
    """`weight` in float32, as it is multiplied with."""

    weight: torch.Tensor
    eps: float
    kind: int


@dataclass(frozen=True, slots=True)
class Rope:
    """`table`: (positions, size) of bfloat16, the cosines before the sines."""

    table: torch.Tensor
    size: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """`norms`: before and after attention, before and after the MLP. `matrices`: qkv, o, gate and up, down."""

    matrices: tuple[Any, Any, Any, Any]
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    q_norm: Norm | None
    k_norm: Norm | None
    attention: Any
    rope: Rope | None
    window: int  # 0: none
    scale: float
    cap: float  # 0: none


@dataclass(frozen=True, slots=True)
class Decoder:
    """`head` is the module whose weight the output layer takes."""

    layers: list[Layer]
    hidden: int
    inner: int
    activation: int
    parallel: bool
    embedding: Any
    head: Any
    last: Norm
    vocabulary: int
    embedding_by: float
    residual_by: float
    logits_by: float
    logits_cap: float


def read(model: Any, positions: int) -> Decoder:
    """The model, which is asked for up to so many positions; Unknown if it is not one that is known."""
    try:
        return _read(model, positions)
    except AttributeError as lacking:
        raise Unknown("model", f"{type(model).__name__} is not built like one that is known: {lacking}") from lacking


def bare(module: Any) -> Any:
    """vLLM's layer below the one that adds adapters to it."""
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module


def _read(model: Any, positions: int) -> Decoder:
    inner = model.model
    _check_forward(model, inner)
    _check_children(inner, DECODER)
    ropes: dict[int, Rope] = {}
    layers = [_layer(layer, inner, ropes, positions) for layer in inner.layers]
    first = inner.layers[0]
    activations = {_activation(layer.mlp.act_fn) for layer in inner.layers}
    shapes = {(it.attention.num_heads, it.attention.num_kv_heads, it.attention.head_size) for it in layers}
    multipliers = {float(getattr(layer, "residual_multiplier", 1)) for layer in inner.layers}
    inputs = {bare(layer.mlp.down_proj).input_size for layer in inner.layers}
    if any(
        len(kinds) > 1 for kinds in (activations, shapes, multipliers, inputs, {_norm_names(it) for it in inner.layers})
    ):
        raise Unknown("model", "its layers differ in size or in kind")
    processor, head = bare(model.logits_processor), bare(getattr(model, "lm_head", inner.embed_tokens))
    embedding = bare(inner.embed_tokens)
    _check_output(processor, head, embedding)
    return Decoder(
        layers=layers,
        hidden=int(embedding.embedding_dim),
        inner=int(inputs.pop()),
        activation=activations.pop(),
        parallel=_norm_names(first) == ("input_layernorm",),
        embedding=embedding,
        head=head,
        last=_norm(inner.norm),
        vocabulary=int(processor.org_vocab_size),
        embedding_by=_embedding_by(inner),
        residual_by=multipliers.pop(),
        logits_by=float(processor.scale),
        logits_cap=float(processor.soft_cap or 0),
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _check_forward(model: Any, inner: Any) -> None:
    modules = [model, inner, *(part for layer in inner.layers for part in (layer, layer.self_attn, layer.mlp))]
    for kind in dict.fromkeys(type(module) for module in modules):
        if _digest(kind.forward) not in families.KNOWN:
            raise Unknown("model", f"of {kind.__name__} it is not known what it computes")


@cache
def _digest(function: Callable[..., Any]) -> str:
    try:
        return digest.of_function(function)
    except (OSError, TypeError, SyntaxError):  # it has no source that could be read
        return ""


def _computes_as_read(kind: type) -> bool:
    """Whether a norm or an activation is what it was, in whichever of its methods says it."""
    name = "forward_native" if f"{kind.__module__}:{kind.__name__}.forward_native" in families.PLAIN else "forward"
    return _digest(getattr(kind, name)) in families.KNOWN


def _check_children(module: Any, known: Iterable[str]) -> None:
    more = {name for name, _ in module.named_children()} - set(known)
    if more:
        raise Unknown("model", f"{type(module).__name__} has {', '.join(sorted(more))}, which is not known")


def _norm_names(layer: Any) -> tuple[str, ...]:
    return tuple(sorted(name for name, _ in layer.named_children() if name not in ("self_attn", "mlp")))


def _layer(layer: Any, inner: Any, ropes: dict[int, Rope], positions: int) -> Layer:
    names = BLOCKS.get(_norm_names(layer))
    if names is None:
        raise Unknown("model", f"{type(layer).__name__} has {', '.join(_norm_names(layer))}, which is not known")
    attention, mlp = layer.self_attn, layer.mlp
    _check_children(attention, ATTENTION)
    _check_children(mlp, MLP)
    impl = attention.attn.impl
    _check_attention(attention)
    before, after, before_mlp, after_mlp = (_norm(getattr(layer, name)) if name else None for name in names)
    return Layer(
        matrices=(attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj),
        norms=(before, after, before_mlp, after_mlp),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention=attention.attn,
        rope=_rope(attention, inner, ropes, positions),
        window=max(int(impl.sliding_window), 0),
        scale=float(impl.scale),
        cap=float(impl.logits_soft_cap or 0),
    )


def _check_attention(module: Any) -> None:
    attention, impl = module.attn, module.attn.impl
    if impl.alibi_slopes is not None or impl.sinks is not None:
        raise Unknown("attention", "its attention has slopes or sinks")
    if getattr(module, "do_llama_4_scaling", False):
        raise Unknown("attention", "its queries are scaled by their position")
    if attention.attn_type != "decoder" or attention.kv_sharing_target_layer_name:
        raise Unknown("attention", "its attention is not a decoder's, or layers share keys")


def _norm(module: Any) -> Norm:
    kind, offset = NORMS.get(_name(type(module)), (None, 0.0))
    if kind is None or not _computes_as_read(type(module)):
        raise Unknown("norm", f"the norm {type(module).__name__} is not known")
    if getattr(module, "variance_size_override", None) or not getattr(module, "has_weight", True):
        raise Unknown("norm", f"the norm {type(module).__name__} is not known")
    if kind == ROUNDED and module.weight.dtype != torch.bfloat16:
        kind = PLAIN
    weight = (module.weight.detach().float() + offset).contiguous()
    return Norm(weight, float(module.variance_epsilon), kind)


def _activation(module: Any) -> int:
    name = _name(type(module)) if _computes_as_read(type(module)) else ""
    if name == f"{_LAYERS}.activation.SiluAndMul":
        return SILU
    if name == f"{_LAYERS}.activation.GeluAndMul" and module.approximate == "tanh":
        return GELU_TANH
    raise Unknown("activation", f"the activation {type(module).__name__} is not known")


def _embedding_by(inner: Any) -> float:
    """What embeddings are multiplied by: a buffer of Gemma's, a setting of Granite's."""
    normalizer = getattr(inner, "normalizer", None)
    if normalizer is not None:
        return float(normalizer)
    return float(inner.config.embedding_multiplier) if _digest(type(inner).forward) == families.GRANITE else 1.0


def _check_output(processor: Any, head: Any, embedding: Any) -> None:
    if getattr(head, "bias", None) is not None:
        raise Unknown("output", "its output layer has a bias")
    if processor.logits_as_input or processor.head_dtype not in (None, torch.bfloat16):
        raise Unknown("output", "its output layer is computed in another type")
    if getattr(head, "weight", None) is None:
        raise Unknown("output", "its output layer is quantized")
    if head.weight.dtype != torch.bfloat16 or embedding.weight.dtype != torch.bfloat16:
        raise Unknown("output", "its embedding is not bfloat16")
    if processor.org_vocab_size > head.num_embeddings_padded:
        raise Unknown("output", "its output layer has fewer rows than its vocabulary")


def _rope(attention: Any, inner: Any, ropes: dict[int, Rope], positions: int) -> Rope | None:
    """How this layer turns queries and keys; None for one that does not."""
    turns = getattr(attention, "use_rope", True)
    if hasattr(attention, "v1"):  # Cohere 2 turns them where it looks through a window
        turns = attention.v1 or attention.sliding_window
    if not turns:
        return None
    module = attention.rotary_emb if hasattr(attention, "rotary_emb") else inner.rotary_emb
    if id(module) not in ropes:
        rope = ropes[id(module)] = _table(module, positions)
        if rope.table.shape[0] < positions:
            raise Unknown("rope", f"its rotation ends at {rope.table.shape[0]} of {positions} positions")
    return ropes[id(module)]


def _table(module: Any, positions: int) -> Rope:
    if isinstance(module, RotaryEmbedding) and type(module).forward_cpu is RotaryEmbedding.forward_cpu:
        table = module.cos_sin_cache = module.cos_sin_cache.to(torch.bfloat16)
        return Rope(table, module.rotary_dim, not module.is_neox_style)
    if type(module).__name__ == "Phi3LongRoPEScaledRotaryEmbedding":
        table = module.long_short_cos_sin_cache.to(torch.bfloat16)
        first = module.original_max_position_embeddings
        return Rope(table[first:] if module.use_long_rope else table[:first], module.rotary_dim, False)
    if module.__class__.__module__.startswith(f"{_HF}.") and module.rope_type in (
        "default",
        "linear",
        "llama3",
        "yarn",
    ):
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * module.inv_freq.float()
        table = torch.cat((angles.cos(), angles.sin()), dim=1) * module.attention_scaling
        return Rope(table.to(torch.bfloat16), table.shape[1], False)
    raise Unknown("rope", f"the rotation {type(module).__name__} is not known")
