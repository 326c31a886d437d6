"""The rank of a token for its log-probability, counted without torch's compiler.

vLLM compiles the one function that counts, anew at every start and when a first request asks for log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CELLS = 1 << 22  # that are compared at a time


def count_greater(original: Callable[..., Any], x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many elements of each row are at least its value; (rows,)."""
    rows = max(1, CELLS // max(1, x.shape[1]))
    counts = [(part >= value).sum(-1) for part, value in zip(x.split(rows), values.split(rows), strict=True)]
    return torch.cat(counts)
