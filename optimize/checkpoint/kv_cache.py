"""Keys and values in 8-bit floating point in the engine's cache: scales measured, and the same rounding in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SCALES = (".k_scale", ".v_scale")
LARGEST = 448.0  # of float8 e4m3
NAME, CAPPED = "loradock_fp8_cache", "loradock_fp8_cache_capped"
SCHEME = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False, "group_size": None,
}  # fmt: skip


@torch.inference_mode()
def measured(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`k_scale` and `v_scale` (1,) of each layer's attention: the widest key and value over the text fit float8."""
    _attend(model)
    seen: dict[str, float] = {}
    for name, module in _attentions(model).items():
        module._watch = lambda key, value, name=name: seen.update({
            f"{name}.k_scale": max(seen.get(f"{name}.k_scale", 0.0), float(key.abs().amax())),
            f"{name}.v_scale": max(seen.get(f"{name}.v_scale", 0.0), float(value.abs().amax())),
        })  # fmt: skip
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for module in _attentions(model).values():
        del module._watch
    return {name: torch.tensor([max(widest, 1e-6) / LARGEST]) for name, widest in seen.items()}


def rounded(model: nn.Module, scales: dict[str, float]) -> None:
    """The model rounds keys and values as the engine's cache does."""
    _attend(model)
    for name, module in _attentions(model).items():
        module._scales = (scales[f"{name}.k_scale"], scales[f"{name}.v_scale"])


def _attentions(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "o_proj") and (hasattr(module, "k_proj") or hasattr(module, "qkv_proj"))
    }


def _attend(model: nn.Module) -> None:
    """Attention goes by the functions below, which look at keys and values or round them before."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    ALL_ATTENTION_FUNCTIONS.register(CAPPED, _capped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CAPPED, eager_mask)
    capped = getattr(model.config, "attn_logit_softcapping", None)
    model.config._attn_implementation = CAPPED if capped else NAME


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = _cached(module, key, value)
    return sdpa_attention_forward(module, query, key, value, *more, **named)


def _capped_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any
) -> Any:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    key, value = _cached(module, key, value)
    return eager_attention_forward(module, query, key, value, *more, **named)


def _cached(module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(module, "_watch"):
        module._watch(key, value)
    if hasattr(module, "_scales"):
        key, value = (_near(x, scale) for x, scale in zip((key, value), module._scales, strict=True))
    return key, value


def _near(x: torch.Tensor, scale: float) -> torch.Tensor:
    steps = (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (steps.float() * scale).to(x.dtype)
