"""A KV cache takes memory where it is written, and not before."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from serve.cpu_kernels.kv_cache import allocate_kv_cache

SIZE = 64 << 20


def allocated(size: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """As vLLM allocates it."""
    return allocate_kv_cache(lambda number: torch.zeros(number, dtype=dtype, device=torch.device("cpu")), size)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_what_no_token_lies_in_takes_no_memory_and_reads_as_zeros():
    before = resident()
    cache = allocated(SIZE)
    assert resident() - before < SIZE // 8
    assert cache.shape == (SIZE,) and cache.dtype == torch.int8
    blocks = cache.view(64, -1)
    blocks[7].fill_(3)
    assert SIZE // 64 <= resident() - before < SIZE // 8
    assert blocks.sum(-1, dtype=torch.int64).nonzero().tolist() == [[7]]


def test_other_zeros_that_vllm_makes_meanwhile_are_torchs_own():
    assert allocated(3, torch.int32).tolist() == [0, 0, 0]
    assert allocated(0).numel() == 0
