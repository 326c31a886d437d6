"""What healing a pruned model needs."""

from __future__ import annotations

from optimize.checkpoint import architectures
from optimize.errors import Refused
from optimize.options import Heal
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate


def estimate(step: Heal, context: Context) -> Estimate:
    size, widest = context.base.bytes, context.widest
    what = "least squares, then " if step.repair else ""
    what += f"distil the original, LoRA of rank {step.rank}, {step.steps} x {step.batch} x {step.tokens} tokens"
    activations = step.batch * step.tokens * 160 * context.hidden * context.layers + 2048 * context.vocabulary
    activations += context.calibration_tokens * (16 * context.hidden + 8 * widest) + 12 * widest * widest
    seconds = STARTING + 20 + 4 * step.steps * step.batch * step.tokens * context.token_seconds
    return Estimate("heal", what, PROCESS + 2 * size + activations, 2 * size, seconds)


def refuse(step: Heal, context: Context) -> None:
    family = architectures.dense(context.base.config, "heal")
    if family.normed and step.repair:
        raise Refused(
            f"{family.name} has a norm between down_proj and the stream, and least squares fit down_proj to the "
            "stream: say `repair: false` and some `steps`"
        )
