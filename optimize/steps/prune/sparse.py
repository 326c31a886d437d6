"""Zeros instead of small weights, unstructured or N of every M, layer by layer.

    magnitude   the smallest weights of each matrix
    wanda       in each row the smallest |w| times the norm of its input (Sun et al., 2023, arXiv 2306.11695)
    sparsegpt   by what a zero costs once the others have made up for it (Frantar and Alistarh, 2023, arXiv 2301.00774)

Each layer is calibrated on what the pruned layers before it give. The checkpoint stays dense: vLLM has no kernel for
zeros, and refuses a `sparsity_config`, so none is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import held, settle, through
from optimize.errors import OptimizeError
from optimize.job import Job, Progress
from optimize.steps.calibrated import CalibratedModel, first_readers, windows
from optimize.steps.prune.rules import pattern_of
from optimize.steps.quantize import gptq

TOGETHER = 8  # columns that get what those before them owe at once


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    options, folder = job.options, Path(job.model)
    pattern, method = pattern_of(options["pattern"]), options["method"]
    ids = windows(job)
    progress(0, 1, "loading")
    model, checkpoint = CalibratedModel(folder, ids, by_layer=True), Checkpoint(folder)
    writer = Writer(job.folder / "model", folder)
    linears = {f"{name}.weight" for unit in model.units for name in unit.names}
    for name in checkpoint.entries:
        if name not in linears:
            writer.add(name, checkpoint.tensor(name))
    zeros = total = 0
    begun, full = model.entered(), model.parameters()
    for at, layer in enumerate(model.layers):
        progress(at, len(model.layers), f"{method}, layer {at + 1} of {len(model.layers)}")
        with held(layer):
            units = model.units_of(at)
            sums = {} if method == "magnitude" else model.hessians(at, first_readers(units), begun)
            for unit in units:
                for name in unit.names:
                    weight = model.linear(name).weight.float()
                    made = sparse(weight, method, options["sparsity"], pattern, sums.get(unit))
                    if not bool(made.isfinite().all()):
                        raise OptimizeError(f"pruning {name} gives NaN or infinity: the weights or the text are broken")
                    writer.add(f"{name}.weight", made.to(checkpoint.tensor(f"{name}.weight").dtype))
                    zeros, total = zeros + int((made == 0).sum()), total + made.numel()
                    model.set_weight(name, made)
            begun = through([layer], begun)
            model.restore(at, full)
    writer.close(checkpoint.config)
    return {
        "zeros": round(zeros / total, 4),
        "layers": len(linears),
        "adapters": {name: "applies unchanged" for name in job.adapters},
    }


def sparse(
    weight: torch.Tensor, method: str, sparsity: float, pattern: tuple[int, int] | None, sums: torch.Tensor | None
) -> torch.Tensor:
    """`weight` (out, in) with zeros; `sums` is the sum of x xT over the inputs, (in, in). float32 both."""
    if method == "sparsegpt":
        assert sums is not None
        return _sparsegpt(weight, sums, sparsity, pattern)
    cost = weight.abs()
    if sums is not None:
        cost = cost * sums.diagonal().sqrt()
    if pattern:
        gone = _lowest(cost.view(len(weight), -1, pattern[1]).movedim(-1, 0), pattern)
        return weight.masked_fill(gone.movedim(0, -1).reshape(weight.shape), 0)
    if method == "wanda":
        cheapest = cost.argsort(dim=1, stable=True)[:, : round(weight.shape[1] * sparsity)]
        return weight.scatter(1, cheapest, 0)
    return weight.masked_fill(_cheapest(cost, sparsity), 0)


def _sparsegpt(
    weight: torch.Tensor, sums: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None
) -> torch.Tensor:
    columns = weight.shape[1]
    sums, left = sums.clone(), weight.T.contiguous()  # a column is a row here
    dead = sums.diagonal() == 0
    sums.diagonal()[dead] = 1
    left[dead] = 0
    upper = _inverse_factor(sums)
    together = pattern[1] if pattern else TOGETHER
    for start in range(0, columns, gptq.BLOCK):
        block, factor = left[start : start + gptq.BLOCK], upper[start : start + gptq.BLOCK, start : start + gptq.BLOCK]
        dearness = factor.diagonal()[:, None]
        errors, gone = torch.empty_like(block), torch.empty(block.shape, dtype=torch.bool)
        if not pattern:
            gone = _cheapest((block / dearness).square_(), sparsity)
        for first in range(0, len(block), together):
            of = slice(first, first + together)
            block[of].addmm_(factor[:first, of].T, errors[:first], alpha=-1)
            if pattern:
                gone[of] = _lowest((block[of] / dearness[of]).square_(), pattern)
            for at in range(first, min(first + together, len(block))):
                torch.mul(block[at], gone[at], out=errors[at]).div_(factor[at, at])
                block[at].masked_fill_(gone[at], 0)
                block[at + 1 : of.stop].addr_(factor[at, at + 1 : of.stop], errors[at], alpha=-1)
        left[start + gptq.BLOCK :].addmm_(upper[start : start + gptq.BLOCK, start + gptq.BLOCK :].T, errors, alpha=-1)
    return left.T.contiguous()


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, damped until there is one."""
    mean = hessian.diagonal().mean()
    damp = gptq.DAMP
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


def _cheapest(cost: torch.Tensor, share: float) -> torch.Tensor:
    """True at that share of all, of equals at the first."""
    flat, count = cost.flatten(), round(cost.numel() * share)
    if not count:
        return torch.zeros(cost.shape, dtype=torch.bool)
    dearest = flat.kthvalue(count).values
    gone, edge = flat < dearest, flat == dearest
    return gone.logical_or_(edge & (edge.cumsum(0) <= count - gone.sum())).view(cost.shape)


def _lowest(cost: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """True at the M - N cheapest along the first axis, of equals at the first. NaN is the dearest: it stays, and is
    found."""
    kept, of = pattern
    gone = torch.empty(cost.shape, dtype=torch.bool)
    for at, one in enumerate(cost):
        before, after = ~(one < cost[:at]), ~(one <= cost[at + 1 :])
        torch.lt(before.sum(0) + after.sum(0), of - kept, out=gone[at])
    return gone
