"""Each weight to the nearest, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimize.steps.quantize.method import Method

if TYPE_CHECKING:
    import torch


def round_(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, hessian: torch.Tensor | None, vectors: int
) -> torch.Tensor:
    from optimize.steps.quantize.gptq import nearest

    return nearest(weight, scale, bits)


METHOD = Method("rtn", round_, calibrates=False, estimate=lambda step, context: (0.0, 0))
