"""GPTQ of weights that follow what the layers before have changed: half as much time again, a quarter less KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimize.steps.planning import following
from optimize.steps.quantize.method import Method
from optimize.steps.quantize.methods import gptq

if TYPE_CHECKING:
    from optimize.steps.planning import Context
    from optimize.steps.quantize.rules import Quantize


def estimate(step: Quantize, context: Context) -> tuple[float, int]:
    return following(context)


METHOD = Method("gptaq", gptq.round_, follows=True, estimate=estimate)
