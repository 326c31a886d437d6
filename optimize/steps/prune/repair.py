"""What pruning took away, put back as far as a linear map can: least squares, layer by layer, no training.

A dropped layer's whole effect on the residual stream is, in the main, a linear function of what the MLP before it
computes. So from the first change on, each layer's down_proj gets the ridge regression of what the stream lacks there
(the original's hidden states minus the pruned model's) on the activations that down_proj reads. The idea is
ReplaceMe's (Shopkhoev et al., 2025, arXiv 2505.02819), which fits a square matrix behind the last layer before the gap;
fitting down_proj itself has as many inputs as the MLP is wide, and going on to the layers after the gap corrects what
was not linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import Entered, through
from optimize.errors import Refused
from optimize.job import Progress

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean diagonal of the activations' second moment


def origins(pruned: Checkpoint, original: Checkpoint, prefix: str) -> list[int]:
    """For each layer of the pruned model, the original's that it is, found by a matrix that pruning leaves alone."""
    leaf = "self_attn.o_proj.weight"  # every family has it, and no step before healing changes it
    count = int(original.config["num_hidden_layers"])
    theirs = [original.tensor(f"{prefix}.{at}.{leaf}") for at in range(count)]
    matched, after = [], 0
    for at in range(int(pruned.config["num_hidden_layers"])):
        ours = pruned.tensor(f"{prefix}.{at}.{leaf}")
        match = next((other for other in range(after, count) if torch.equal(ours, theirs[other])), None)
        if match is None:
            raise Refused(f"layer {at} of the pruned model is none of the original's: heal right after pruning")
        matched.append(match)
        after = match + 1
    return matched


def first_changed(pairs: list[int], narrowed: bool) -> int:
    """The first layer that can make up for something: the one before the first gap."""
    if narrowed:
        return 0
    gap = next((at for at, original in enumerate(pairs) if at != original), len(pairs))
    return max(0, gap - 1)


@torch.inference_mode()
def repaired(
    student: list[nn.Module],
    teacher: list[nn.Module],
    pairs: list[int],
    first: int,
    begin: Entered,
    progress: Progress,
    multiplier: float = 1.0,
) -> list[tuple[float, float]]:
    """Change down_proj from layer `first` on; what the stream lacked before and lacks after, relative, at each layer.

    `begin` is what enters the first layer of both models, and `multiplier` is what a block's output is multiplied with
    before it is added to the stream.
    """
    lacked = []
    ours = through(student[:first], begin.lent(student, [teacher[at] for at in pairs]))
    theirs = through(teacher[: pairs[first]], begin)
    for at in range(first, len(student)):
        progress(at - first, len(student) - first, f"least squares, layer {at + 1} of {len(student)}")
        until = pairs[at + 1] if at + 1 < len(pairs) else len(teacher)
        theirs = through(teacher[pairs[at] : until], theirs)
        lacked.append(_fitted(student[at], ours, theirs, multiplier))
        ours = through(student[at : at + 1], ours)
    return lacked


def _fitted(layer: Any, ours: Entered, theirs: Entered, multiplier: float) -> tuple[float, float]:
    """Change one layer's down_proj so that what leaves the layer is nearest to `theirs`. How much the stream lacked
    there, relative to its size, before and after, on a quarter of the text that decides how far to go and is not
    fitted."""
    read: list[torch.Tensor] = []
    down = layer.mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    made = through([layer], ours)
    handle.remove()
    pairs = []
    for x, mine, right in zip(read, made.states, theirs.states, strict=True):
        x, mine, right = (each.flatten(0, -2).float() for each in (x * multiplier, mine, right))
        # Each token counts the same: a few have a stream a hundred times as large, and would be all that is fitted.
        weight = right.norm(dim=1, keepdim=True).clamp(min=1e-6).reciprocal()
        pairs.append((x * weight, (right - mine) * weight))
    kept = max(1, len(pairs) // 4)
    moment, product = (
        torch.zeros(down.in_features, down.in_features),
        torch.zeros(down.in_features, down.out_features),
    )
    for x, lacks in pairs[kept:]:
        moment += x.T @ x
        product += x.T @ lacks
    mean = float(moment.diagonal().mean()) + 1e-12
    unseen = torch.cat([x for x, _ in pairs[:kept]])
    wanted = torch.cat([lacks for _, lacks in pairs[:kept]])
    before = least = float(wanted.square().sum())
    best: torch.Tensor | None = None
    for ridge in RIDGES:
        ridged = moment.clone()
        ridged.diagonal().add_(ridge * mean)
        lower, bad = torch.linalg.cholesky_ex(ridged)
        if bad:
            continue
        change = torch.cholesky_solve(product, lower)
        left = float((wanted - unseen @ change).square().sum())
        if left < least:
            best, least = change, left
    if best is not None:
        down.weight = nn.Parameter((down.weight.float() + best.T).to(down.weight.dtype), requires_grad=False)
    return round((before / len(wanted)) ** 0.5, 4), round((least / len(wanted)) ** 0.5, 4)
