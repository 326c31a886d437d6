"""What vLLM does around each step, without what takes a small step longer than it is worth."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from serve.cpu_kernels.build import library
from serve.cpu_kernels.packing import at

FEW = 64  # tokens whose slots are sooner computed here than other threads wake up


def copy_to_gpu(original: Callable[..., torch.Tensor], buffer: Any, n: int | None = None) -> torch.Tensor:
    """On a CPU both are one tensor."""
    if buffer.gpu is not buffer.cpu:
        return original(buffer, n)
    return buffer.gpu if n is None else buffer.gpu[:n]


def compute_slot_mapping(
    original: Callable[..., None], table: Any, requests: int, starts: torch.Tensor, positions: torch.Tensor
) -> None:
    kernels = library()
    if kernels is None or positions.shape[0] > FEW or table.slot_mapping_mode.name != "TOKEN_TO_KV_SLOT":
        original(table, requests, starts, positions)
        return
    blocks = table.block_table.gpu
    kernels.loradock_slots(
        at(starts),
        at(positions),
        at(blocks),
        ctypes.c_int64(blocks.stride(0)),
        ctypes.c_int64(table.block_size),
        at(table.slot_mapping.gpu),
        requests,
    )


def greedy_sample(original: Callable[..., torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    rows, size = logits.shape
    kernels = library()
    if kernels is None or rows > 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        return original(logits)
    first = logits.data_ptr()
    best = [kernels.loradock_argmax(ctypes.c_void_p(first + 4 * size * i), ctypes.c_int64(size)) for i in range(rows)]
    return torch.tensor(best, dtype=torch.int64)
