"""Many LoRA adapters on a CPU: what replaces vLLM's own path there, through vLLM's own extension points.

`install` is called in each of vLLM's processes. It changes which class the CPU platform names for the LoRA operations
(`punica.Punica`), lets a model that `step` knows compute a whole step in one call, and, if asked, keeps torch.compile
on although LoRA is on.
"""

from __future__ import annotations

import logging
import os
from typing import Any

log = logging.getLogger("loradock")

VARIABLE = "LORADOCK_LORA_KERNELS"
WEIGHTS = "LORADOCK_CPU_WEIGHTS"


def install() -> None:
    """Take over the CPU's LoRA path in this process; nothing on another platform, or with LORADOCK_LORA_KERNELS=off."""
    from vllm.platforms import current_platform

    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "off" or not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    if getattr(CpuPlatform.get_punica_wrapper, "__module__", "") == __name__:
        return

    def get_punica_wrapper(cls: type) -> str:
        return "serve.cpu_kernels.punica.Punica"

    CpuPlatform.get_punica_wrapper = classmethod(get_punica_wrapper)
    if wanted == "compile":
        _keep_compiling(CpuPlatform)
    if wanted == "auto":
        from serve.cpu_kernels import step

        if step.available():
            step.install(int8=os.environ.get(WEIGHTS) == "int8")
        elif os.environ.get(WEIGHTS) == "int8":
            log.warning("cpu_weights=int8 needs AVX-512 BF16, VNNI and a C++ compiler: weights stay as they are")


def _keep_compiling(platform: Any) -> None:
    """vLLM turns torch.compile off when it sees a LoRA config: its own LoRA path on a CPU cannot be compiled."""
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if lora is None or (reason := _why_eager(vllm_config)):
            if lora is not None:
                log.warning("torch.compile stays off with adapters: %s", reason)
            stock(cls, vllm_config)
            return
        vllm_config.lora_config = None
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)


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
