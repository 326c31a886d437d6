"""What vLLM does around each step, without what takes a small step longer than it is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def copy_to_gpu(original: Callable[..., torch.Tensor], buffer: Any, n: int | None = None) -> torch.Tensor:
    """On a CPU both are one tensor."""
    if buffer.gpu is not buffer.cpu:
        return original(buffer, n)
    return buffer.gpu if n is None else buffer.gpu[:n]


def apply_adapters(original: Callable[..., None], worker: Any, requests: set[Any]) -> None:
    """Have these adapters in their slots, where they are in all but a few steps: then they are as recently used.

    vLLM makes a list of all adapters that are in memory for each that a step uses.
    """
    manager = worker._adapter_manager
    known, active = manager._registered_adapters, manager._active_adapters
    wanted = [request for request in requests if request]
    if any(it.load_inplace or it.lora_int_id not in known or it.lora_int_id not in active for it in wanted):
        original(worker, requests)
        return
    for request in wanted:
        known.touch(request.lora_int_id)
        active.touch(request.lora_int_id)
