"""Scales that protect what matters (AWQ: Lin et al., 2023, arXiv 2306.00978).

The few input channels with large activations decide most of a layer's answer. Their weights are scaled up before they
are rounded, and what makes the input is scaled down, which changes nothing but the rounding: s = |x|^a, with the root
mean square of each channel for |x|, and `a` searched for the least error of the answer. Both come from H = sum of x xT
alone: that error is the sum of (dW H) * dW, for the rounding's error dW.
"""

from __future__ import annotations

import torch

from optimize.steps.planning import GRID


def factors(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """(in,): what the columns of `weight` (out, in) are multiplied with."""
    wide = hessian.diagonal().sqrt()
    wide = (wide / wide.max().clamp(min=1e-12)).clamp(min=1e-4)
    best, chosen = torch.inf, torch.ones(weight.shape[1])
    for step in range(GRID):
        factor = wide ** (step / GRID)
        factor = factor / (factor.max() * factor.min()).sqrt()
        off = _nearest(weight * factor, bits, group) / factor - weight
        error = float(((off @ hessian) * off).sum())
        if error < best:
            best, chosen = error, factor
    return chosen


def _nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    rows, columns = weight.shape
    limit = 2 ** (bits - 1) - 1
    parts = weight.view(rows, columns // group, group)
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-8) / limit
    return ((parts / scale).round().clamp(-limit - 1, limit) * scale).view(rows, columns)
