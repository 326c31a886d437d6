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
        return weight.masked_fill(_lowest(cost.view(len(weight), -1, pattern[1]), pattern).view_as(weight), 0)
    if method == "wanda":
        gone = cost.argsort(dim=1, stable=True)[:, : round(weight.shape[1] * sparsity)]
        return weight.scatter(1, gone, 0)
    gone = cost.flatten().argsort(stable=True)[: round(weight.numel() * sparsity)]
    return weight.flatten().scatter(0, gone, 0).view_as(weight)


def _sparsegpt(
    weight: torch.Tensor, sums: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None
) -> torch.Tensor:
    columns = weight.shape[1]
    sums, weight = sums.clone(), weight.clone()
    dead = sums.diagonal() == 0
    sums.diagonal()[dead] = 1
    weight[:, dead] = 0
    upper = _inverse_factor(sums)
    for start in range(0, columns, gptq.BLOCK):
        end = min(start + gptq.BLOCK, columns)
        block, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        gone = torch.zeros(block.shape, dtype=torch.bool)
        if not pattern:
            cost = (block / factor.diagonal()).square().flatten()
            gone.view(-1)[cost.argsort(stable=True)[: round(block.numel() * sparsity)]] = True
        errors = torch.empty_like(block)
        for at in range(end - start):
            if pattern and at % pattern[1] == 0:
                of = slice(at, at + pattern[1])
                gone[:, of] = _lowest((block[:, of] / factor.diagonal()[of]).square(), pattern)
            kept = block[:, at].masked_fill(gone[:, at], 0)
            error = (block[:, at] - kept) / factor[at, at]
            block[:, at:] -= error[:, None] * factor[at, at:]
            block[:, at] = kept
            errors[:, at] = error
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


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


def _lowest(cost: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """True at the M - N cheapest of the last axis' M."""
    kept, of = pattern
    gone = cost.argsort(dim=-1, stable=True)[..., : of - kept]
    return torch.zeros(cost.shape, dtype=torch.bool).scatter(-1, gone, True)
