"""Column by column, each one put right for the errors of those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimize.steps.quantize.method import Method

if TYPE_CHECKING:
    import torch


def round_(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, hessian: torch.Tensor | None, vectors: int
) -> torch.Tensor:
    from optimize.steps.quantize import gptq

    if hessian is None:
        return gptq.nearest(weight, scale, bits)
    return gptq.gptq(weight, gptq.damped(hessian, vectors) if bits == 4 else hessian, scale, bits)


METHOD = Method("gptq", round_)
