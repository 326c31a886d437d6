"""Many LoRA adapters on a CPU: what replaces vLLM's own path there (`serve.vllm_backend.patches.table`).

The CPU platform names our class for the LoRA operations (`punica.Punica`), a model that `step` knows computes a whole
step in one call, and, if asked, torch.compile stays on although LoRA is on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from serve.cpu_kernels.build import ARM64, step_available

log = logging.getLogger("loradock")

VARIABLE = "LORADOCK_LORA_KERNELS"
WEIGHTS = "LORADOCK_CPU_WEIGHTS"


def install() -> None:
    """In each of vLLM's processes on a CPU."""
    if torch.cpu._is_amx_tile_supported():
        # Who uses tiles asks the kernel for them first. vLLM's attention leaves that to others.
        torch.cpu._init_amx()
    weights = os.environ.get(WEIGHTS, "auto")
    if weights != "auto" and not step_available():
        needed = f"AVX2, or arm64 with dot products and {ARM64}=1, and a C++ compiler"
        log.warning("cpu_weights=%s needs %s: weights stay as they are", weights, needed)


def with_an_adapter(
    original: Any, inputs: Any, weights: Any, outputs: Any, slots: Any, *others: Any, **named: Any
) -> None:
    """vLLM's product, which adds nothing to a row without an adapter."""
    original(inputs.masked_fill((slots < 0).unsqueeze(-1), 0), weights, outputs, slots, *others, **named)


def get_lora_device(original: Callable[..., torch.device], base_layer: torch.nn.Module) -> torch.device:
    # The int8 kernel has packed the weight and left None in its place.
    return torch.device("cpu") if getattr(base_layer, "weight", 0) is None else original(base_layer)


def multiply_int8_rows(original: Any, kernel: Any, layer: torch.nn.Module, x: torch.Tensor, *bias: Any) -> torch.Tensor:
    """vLLM's product of any shape, as its kernel without AMX takes them."""
    made: torch.Tensor = original(kernel, layer, x.reshape(-1, x.shape[-1]), *bias)
    return made.view(*x.shape[:-1], -1)


def get_punica_wrapper(original: Any, platform: Any) -> str:
    return "serve.cpu_kernels.punica.Punica"


def check_and_update_config(original: Any, platform: Any, vllm_config: Any) -> None:
    """vLLM turns torch.compile off when it sees a LoRA config: its own LoRA path on a CPU cannot be compiled."""
    lora = vllm_config.lora_config
    if lora is None or (reason := _why_eager(vllm_config)):
        if lora is not None:
            log.warning("torch.compile stays off with adapters: %s", reason)
        original(platform, vllm_config)
        return
    vllm_config.lora_config = None
    try:
        original(platform, vllm_config)
    finally:
        vllm_config.lora_config = lora


def _why_eager(vllm_config: Any) -> str | None:
    """What forbids compiling this model with adapters, in words; None if nothing does.

    In a compiled graph only operations that are opaque to the compiler may depend on the adapters of a step.
    """
    from serve.cpu_kernels.build import compiler

    model, lora = vllm_config.model_config, vllm_config.lora_config
    if compiler() is None:
        return "there is no C++ compiler (install g++)"
    if lora.fully_sharded_loras:
        return "fully_sharded_loras is on"
    if model is not None and (getattr(model, "is_multimodal_model", False) or _has_experts(model)):
        return "of this kind of model its LoRA layers are not known"
    return None


def _has_experts(model: Any) -> bool:
    config = model.hf_text_config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)
