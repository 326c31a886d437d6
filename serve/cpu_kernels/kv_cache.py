"""A KV cache of a CPU's engine: its memory is taken as tokens come to lie in it.

vLLM writes zeros over all of it at the start. Fresh memory of the kernel's reads as zeros until it is written, so what
no request has needed yet is nobody's, and a start does not wait for gigabytes of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def allocate_kv_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Fresh():
        return original(*args, **kwargs)


class _Fresh(TorchFunctionMode):
    """Bytes of zeros for a CPU come from the kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        wanted = func is torch.zeros and len(args) == 1 and named.get("dtype") is torch.int8
        if wanted and torch.device(named.get("device") or "cpu").type == "cpu":
            return fresh(int(args[0]))
        return func(*args, **named)


def fresh(size: int) -> torch.Tensor:
    """So many bytes of zeros that take no memory yet."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError):  # torch says what is wrong
        return torch.zeros(size, dtype=torch.int8)
    return torch.frombuffer(memory, dtype=torch.int8)
