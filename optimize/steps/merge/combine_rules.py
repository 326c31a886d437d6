"""What combining adapters needs, and which adapters cannot be combined."""

from __future__ import annotations

from optimize.errors import Refused
from optimize.options import Combine
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate, beyond_low_rank

SAME_RANK = {"linear"}  # methods that want adapters of one rank


def estimate(step: Combine, context: Context) -> Estimate:
    what = f"{', '.join(step.adapters)} into one adapter, {step.name}, by {step.method}"
    size = context.base.bytes
    return Estimate("combine", what, PROCESS + size // 2, size // 10, STARTING + 10)


def refuse(step: Combine, context: Context) -> None:
    configs = {name: context.adapters[name] for name in step.adapters if name in context.adapters}
    ranks = {name: int(config["r"]) for name, config in configs.items()}
    if step.method in SAME_RANK and len(set(ranks.values())) > 1:
        raise Refused(
            f"combine by {step.method} wants adapters of one rank, these have {ranks}: take method svd or cat"
        )
    for name, config in configs.items():
        if config.get("lora_bias"):
            raise Refused(
                f"the adapter {name!r} has biases beside its B matrices (lora_bias), which cannot be combined: "
                "merge it into the base instead"
            )
        if beyond_low_rank(config):
            raise Refused(
                f"the adapter {name!r} is more than a low-rank update (DoRA or modules_to_save) "
                "and cannot be combined: merge it into the base instead"
            )
