"""What is left out between steps changes nothing but their time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.utils import CpuGpuBuffer

from serve.cpu_kernels import between_steps


def bare(function):
    """vLLM's own, below what replaces it."""
    return bare(function.loradock_original) if hasattr(function, "loradock_original") else function


def buffer(shared: bool) -> CpuGpuBuffer:
    made = CpuGpuBuffer.__new__(CpuGpuBuffer)
    made.cpu = torch.arange(12).view(4, 3)
    made.gpu = made.cpu if shared else torch.zeros(4, 3, dtype=torch.int64)
    return made


@pytest.mark.parametrize("shared", [True, False])
def test_a_buffer_is_where_it_is_read_after_it_was_copied(shared):
    made = buffer(shared)
    got = between_steps.copy_to_gpu(bare(CpuGpuBuffer.copy_to_gpu), made, 2)
    assert torch.equal(got, made.cpu[:2]) and got.data_ptr() == made.gpu.data_ptr()
    assert torch.equal(made.gpu[2:], made.cpu[2:]) == shared
    assert torch.equal(between_steps.copy_to_gpu(bare(CpuGpuBuffer.copy_to_gpu), made), made.cpu)
    assert torch.equal(made.gpu, made.cpu)
