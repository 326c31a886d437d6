"""Ranks of tokens are those that vLLM counts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from serve.cpu_kernels import token_ranks


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_ranks_are_counted_as_vllm_counts_them(monkeypatch, rows):
    monkeypatch.setattr(token_ranks, "CELLS", 300)
    x = torch.randn(rows, 100).log_softmax(-1)
    values = x.gather(-1, torch.randint(100, (rows, 1)))
    assert torch.equal(token_ranks.count_greater(print, x, values), (x >= values).sum(-1))
