"""Where a step computes: on the machine's GPU, if there is one with room for it, or on its processor."""

from __future__ import annotations

from typing import Any

from optimize import processor
from optimize.errors import Refused
from optimize.recipe import Recipe
from optimize.steps.kind import kinds
from optimize.steps.planning import Estimate

CPU, CUDA = "cpu", "cuda"
# Beside a recipe's steps. The others compute where their own runtime does: the exports in ONNX Runtime on a CPU, the
# engine in vLLM.
MEASURING = ("evaluate", "tasks")
USED = 0.9  # of what is free of a GPU's memory; CUDA takes some itself


def check(recipe: Recipe) -> None:
    if recipe.device == CUDA and processor.gpu() is None:
        raise Refused("the recipe says `device: cuda`, and torch finds no GPU here: leave it at `auto`")


def of_step(
    kind: str, options: dict[str, Any], recipe: Recipe, steps: tuple[Estimate, ...], size: int
) -> tuple[str, ...]:
    """`cuda` or `cpu`, for a step over a base of `size` bytes; the better first, where either may compute it."""
    gpu = processor.gpu()
    computes = kind in kinds() or kind in MEASURING
    if recipe.device == CPU or gpu is None or not computes or options.get("format") == "onnx":
        return (CPU,)
    if recipe.device == CUDA:
        return (CUDA,)
    # What is estimated counts no weights where they are mapped from the disk; on a GPU they are there whole.
    need = size + max((step.memory for step in steps if step.kind == kind), default=0)
    return (CUDA, CPU) if need <= USED * min(gpu.free(), gpu.memory) else (CPU, CUDA)
