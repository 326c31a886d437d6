"""Rounding a weight matrix to few bits: to the nearest, or by GPTQ (Frantar et al., 2023, arXiv 2210.17323).

W is (out, in) in float32, H = sum of x xT over calibration inputs x, (in, in). The result is integers (out, in) and
scales (out, groups): W is about integers * scale. Symmetric, so there is no zero point.
"""

from __future__ import annotations

import torch

BLOCK = 128
DAMP = 0.01
SHRINKS = [1.0 - 0.02 * step for step in range(20)]


def scales(weight: torch.Tensor, bits: int, group: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """(out, in / group) in bfloat16's numbers. Below 8 bits, the clipping with the least squared error weighted by
    `importance` (in,), the diagonal of H."""
    rows, columns = weight.shape
    limit = 2 ** (bits - 1) - 1
    parts = weight.view(rows, columns // group, group)
    widest = parts.abs().amax(-1).clamp(min=1e-8)
    if bits >= 8:
        return (widest / limit).bfloat16().float()
    heavy = torch.ones(columns) if importance is None else importance
    heavy = heavy.view(1, columns // group, group)
    best = torch.full_like(widest, torch.inf)
    chosen = widest / limit
    for shrink in SHRINKS:
        scale = (widest * shrink / limit).bfloat16().float().clamp(min=1e-12)
        near = (parts / scale[..., None]).round().clamp(-limit - 1, limit) * scale[..., None]
        error = ((near - parts).square() * heavy).sum(-1)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in): each number rounded by itself."""
    limit = 2 ** (bits - 1) - 1
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return (weight / wide).round().clamp(-limit - 1, limit).to(torch.int8)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in): columns in order of importance, each one's rounding error put right by those that follow."""
    columns = weight.shape[1]
    limit = 2 ** (bits - 1) - 1
    group = columns // scale.shape[1]
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian[order][:, order]
    weight = weight[:, order]
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    upper = inverse_factor(hessian)
    integers = torch.empty(weight.shape, dtype=torch.int8)
    of_column = (order // group).tolist()
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = weight[:, start:end]
        errors = torch.empty_like(block)
        factor = upper[start:end, start:end]
        for at in range(end - start):
            column = block[:, at]
            step = scale[:, of_column[start + at]]
            near = (column / step).round_().clamp_(-limit - 1, limit)
            integers[:, start + at] = near.to(torch.int8)
            error = (column - near * step) / factor[at, at]
            block[:, at:] -= error[:, None] * factor[at, at:]
            errors[:, at] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return integers[:, back].contiguous()


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, damped until there is one."""
    mean = hessian.diagonal().mean()
    damp = DAMP
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        del damped  # a matrix of a wide layer is a gigabyte
        if not bad:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, bad = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bad:
                return upper
        damp *= 10
