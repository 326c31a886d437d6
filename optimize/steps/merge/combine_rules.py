"""What combining adapters needs, and which adapters cannot be combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from optimize.errors import RecipeError, Refused
from optimize.options import Step, check_name
from optimize.steps.kind import StepKind
from optimize.steps.merge.rules import check_weights, refuse_unmerged
from optimize.steps.planning import Context, Estimate, beside_products

SAME_RANK = {"linear"}  # methods that want adapters of one rank


class Combine(Step, frozen=True, kw_only=True, tag="combine"):
    """Several adapters into one adapter called `name`."""

    reads_text: ClassVar[bool] = False
    name: str
    adapters: tuple[str, ...]
    method: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "svd"
    weights: tuple[float, ...] = ()
    rank: int = 0
    density: float = 0.5

    @property
    def consumed(self) -> tuple[str, ...]:
        return self.adapters

    @property
    def makes(self) -> str:
        return self.name

    def check(self, where: str) -> None:
        check_weights(self, where)
        if not 0 < self.density <= 1:
            raise RecipeError(f"{where}: density is above 0 and at most 1, not {self.density}")
        if self.rank < 0:
            raise RecipeError(f"{where}: rank is above 0, or 0 for the widest of the adapters', not {self.rank}")
        check_name(self.name, where)


def estimate(step: Combine, context: Context) -> Estimate:
    what = f"{', '.join(step.adapters)} into one adapter, {step.name}, by {step.method}"
    size = context.base.bytes
    return Estimate("combine", what, context.machine.process + size // 2, size // 10, 10.0)


def refuse(step: Combine, context: Context) -> None:
    configs = {name: context.adapters[name] for name in step.adapters if name in context.adapters}
    ranks = {name: int(config["r"]) for name, config in configs.items()}
    if step.method in SAME_RANK and len(set(ranks.values())) > 1:
        raise Refused(
            f"combine by {step.method} wants adapters of one rank, these have {ranks}: take method svd or cat"
        )
    for name, config in configs.items():
        if config.get("fan_in_fan_out"):
            raise Refused(
                f"the adapter {name!r} is for layers whose weights lie the other way round (fan_in_fan_out), and "
                "cannot be combined: merge it into the base instead"
            )
        refuse_unmerged(name, config)
        if reason := beside_products(context, name):
            raise Refused(f"the adapter {name!r} {reason} and cannot be combined: merge it into the base instead")


def sentence(options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    return (
        f"{options['name']}: {notes['means']}. Rank {notes['rank']}, "
        f"{notes['error']:.2%} off the exact weighted sum of the updates."
    )


STEP = StepKind(Combine, "optimize.steps.merge.combine", estimate, refuse, sentence, worst=("combine_error",))
