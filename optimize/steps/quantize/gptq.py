"""Rounding a weight matrix to few bits: to the nearest, or by GPTQ (Frantar et al., 2023, arXiv 2210.17323).

W is (out, in) in float32, H = sum of x xT over calibration inputs x, (in, in). The result is integers (out, in) and
scales (out, groups): W is about integers * scale. Symmetric, so there is no zero point; at 4 bits a scale may be
negative, since there are eight integers below zero and seven above.
"""

from __future__ import annotations

import torch

from optimize.checkpoint.model import threads

BLOCK = 128
CACHED = 1 << 17  # weights whose scales are searched at a time: they stay in the processor's cache
DAMP = 0.01
SHRUNK = (0.05, 0.14, 0.26)  # shares of the range that are given up, in attempts for both signs
NARROWEST = 1e-8  # of a group's range, and the scale of zeros
FOLLOWED = 0.25  # of what the layers before have changed; all of it puts noise of the calibration text into the weights
REFINED = 2  # so often the best one's integers are taken then


def scales(weight: torch.Tensor, bits: int, group: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """(out, in / group) in bfloat16's numbers. Below 8 bits, the clipping with the least squared error weighted by
    `importance` (in,), the diagonal of H."""
    rows, columns = weight.shape
    limit = 2 ** (bits - 1) - 1
    parts = weight.view(rows, columns // group, group)
    widest = parts.abs().amax(-1).clamp(min=NARROWEST)
    if bits >= 8:
        return (widest / limit).bfloat16().float()
    heavy = torch.ones(columns) if importance is None else importance.contiguous()
    heavy = heavy.view(1, columns // group, group)
    few = max(1, CACHED // columns)
    of_rows = zip(parts.split(few), widest.split(few), strict=True)
    with threads(1):  # many small operations
        return torch.cat([_clipped(some, of, limit, heavy) for some, of in of_rows])


def _clipped(parts: torch.Tensor, widest: torch.Tensor, limit: int, heavy: torch.Tensor) -> torch.Tensor:
    """The scales (rows, groups) of `parts` (rows, groups, group) with the least weighted error.

    To the integers q that a shrunk range gives belongs a best scale, sum(h w q) / sum(h q q), which takes
    sum(h w q)^2 / sum(h q q) off the error: that is compared, and the best scale's own integers have a better one yet.
    """
    weighted = parts * heavy
    integers, steps, product = (torch.empty_like(parts) for _ in range(3))

    def fitted(lowest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale of the integers that `steps` are from `lowest` on, and what it takes off the error."""
        torch.clamp(steps, lowest, lowest + 2 * limit + 1, out=integers)
        along = torch.mul(weighted, integers, out=product).sum(-1)
        scale = along / integers.square_().mul_(heavy).sum(-1).clamp_(min=1e-30)
        scale.masked_fill_(scale == 0, NARROWEST)
        return scale, along.mul_(scale)

    found = []
    for share in SHRUNK:
        torch.mul(parts, (limit / (1 - share) / widest)[..., None], out=steps).round_()
        found += [(*fitted(-limit - 1), 1.0), (*fitted(-limit), -1.0)]
    scales, gains = (torch.stack(part) for part in list(zip(*found, strict=True))[:2])
    best = gains.argmax(0)[None]
    chosen = scales.gather(0, best)[0]
    # Integers have one more below zero, for the side that the sign turns there.
    sign = torch.tensor([way for *_, way in found])[best[0]]
    parts, weighted = parts * sign[..., None], weighted.mul_(sign[..., None])
    for _ in range(REFINED):
        torch.mul(parts, chosen.reciprocal()[..., None], out=steps).round_()
        chosen = fitted(-limit - 1)[0]
    return (chosen * sign).bfloat16().float()


def nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in): each number rounded by itself."""
    limit = 2 ** (bits - 1) - 1
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return (weight / wide).round().clamp(-limit - 1, limit).to(torch.int8)


def following(weight: torch.Tensor, hessian: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """(out, in): W moved a part of the way to what gives for the inputs x of now what W gives for y, which they would
    be if no layer before were rounded (GPTAQ: Li et al., 2025, arXiv 2504.02692).

    The least squares are W + W (sum of (y - x) xT) H^-1; `apart` (in, in) is that sum. H is `damped`.
    """
    lower, bad = torch.linalg.cholesky_ex(hessian)
    if bad:
        lower = _factor(hessian.clone())
    if len(weight) > len(hessian):
        return torch.addmm(weight, weight, torch.cholesky_solve(apart.T, lower).T, alpha=FOLLOWED)
    return torch.add(weight, torch.cholesky_solve((weight @ apart).T, lower).T, alpha=FOLLOWED)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int, lowest: int | None = None
) -> torch.Tensor:
    """int8 (out, in), from `lowest` on: columns in order of importance, each one put right for the errors of those
    before it.

    With H = U D Ut for a unit upper triangular U, the error of the output is the sum of D[k] (e U)[k]^2 for the
    rounding's error e, so that column k is rounded once e U up to there is added to it. That is GPTQ without the
    inverse of H (Chee et al., 2023, arXiv 2307.13304, theorem 6).
    """
    columns = weight.shape[1]
    lowest = -(2 ** (bits - 1)) if lowest is None else lowest
    group = columns // scale.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    # From the last column to the first, U is a lower triangle, as Cholesky's factor is. A column is a row here.
    order = order.flip(0)
    feedback = _unit_lower(hessian, order)
    left = weight.T.contiguous()[order]  # of the weights; their errors as soon as they are rounded
    integers = torch.empty(left.shape, dtype=torch.int8)
    steps = scale.T.contiguous()[order // group]
    for end in range(columns, 0, -BLOCK):
        start = max(0, end - BLOCK)
        errors = left[start:end]
        wished = torch.addmm(errors, feedback[end:, start:end].T, left[end:])
        inside = feedback[start:end, start:end].T.contiguous()  # a strided vector is slow to multiply with
        of_block = zip(*(part.unbind() for part in (wished, steps[start:end], errors, inside)), strict=True)
        for at, (near, step, error, factors) in reversed(list(enumerate(of_block, 1))):
            if at < end - start:
                near.addmv_(errors[at:].T, factors[at:])
            near.div_(step).round_().clamp_(lowest, lowest + 2**bits - 1)
            error.addcmul_(near, step, value=-1)
        integers[start:end] = wished
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return integers[back].T.contiguous()


def _unit_lower(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """L with a diagonal of ones, L D Lt = H in that order of rows and columns, and damped until there is one."""
    ordered = torch.empty_like(hessian)
    for some, rows in zip(ordered.split(BLOCK), order.split(BLOCK), strict=True):
        torch.index_select(hessian[rows], 1, order, out=some)
    lower = _factor(ordered)
    return lower.div_(lower.diagonal().clone())


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """Cholesky's factor of H, which is damped in place until there is one."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # of a channel that was never active
    own = diagonal.clone()
    mean = diagonal.mean()
    damp = DAMP
    while True:
        diagonal.copy_(own + damp * mean)
        lower, bad = torch.linalg.cholesky_ex(hessian)
        if not bad:
            return lower
        del lower  # a matrix of a wide layer is a gigabyte
        damp *= 10


def damped(hessian: torch.Tensor, vectors: int) -> torch.Tensor:
    """H, from so many vectors, with a ridge in place: what few vectors say about many inputs is half chance.

    The ridge is the share of inputs to vectors, of H's mean diagonal. Without it GPTQ on 8,192 vectors of 1,536 inputs
    can be worse than rounding to the nearest, on vectors that it did not see.
    """
    diagonal = hessian.diagonal()
    diagonal.add_(float(max(DAMP, len(hessian) / vectors) * diagonal.mean()) or 1.0)
    return hessian
