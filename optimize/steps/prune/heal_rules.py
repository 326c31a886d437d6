"""What healing a pruned model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from msgspec.structs import replace

from optimize.checkpoint import architectures
from optimize.errors import RecipeError, Refused
from optimize.options import Step
from optimize.steps.kind import StepKind
from optimize.steps.planning import Context, Estimate
from optimize.steps.prune.rules import Prune

HELD = 16  # windows of evaluation text on which the loss is measured


class Heal(Step, frozen=True, kw_only=True, tag="heal"):
    """Put back what a linear map can (`repair`), then distil the original into the pruned model through a LoRA that is
    merged."""

    after_quantizing: ClassVar[str] = "heal before quantizing; a quantized model's weights cannot be trained"
    repair: bool = True
    steps: int = 200
    rank: int = 32
    learning_rate: float = 1e-3
    batch: int = 4
    tokens: int = 256
    samples: int = 0

    def check(self, where: str) -> None:
        if min(self.rank, self.batch, self.tokens) < 1 or self.learning_rate <= 0:
            raise RecipeError(f"{where}: rank, batch, tokens and learning_rate are above 0")
        if self.steps < 0 or not (self.steps or self.repair):
            raise RecipeError(f"{where}: steps is above 0, or 0 with `repair: true`")

    @property
    def measures(self) -> tuple[str, ...]:
        return ("healed",)

    def check_order(self, where: str, before: Sequence[Step], later: Sequence[Step]) -> None:
        super().check_order(where, before, later)
        pruned = [step for step in before if isinstance(step, Prune)]
        if any(step.vocabulary for step in pruned):
            raise RecipeError(f"{where}: heal before trimming the vocabulary; the original answers in its own tokens")
        if any(step.zeros for step in pruned):
            raise RecipeError(f"{where}: healing changes every weight and would fill the zeros; heal before")


def estimate(step: Heal, context: Context) -> Estimate:
    size, widest = context.base.bytes, context.widest
    what = "least squares, then " if step.repair else ""
    what += f"distil the original, LoRA of rank {step.rank}, {step.steps} x {step.batch} x {step.tokens} tokens"
    activations = step.batch * step.tokens * 160 * context.hidden * context.layers + 2048 * context.vocabulary
    activations += context.calibration_tokens * (16 * context.hidden + 8 * widest) + 12 * widest * widest
    # A step reads each weight four times, however few its tokens are.
    each = context.layers * context.machine.answering + step.batch * step.tokens * context.token_seconds
    seconds = 20 + 4 * step.steps * each
    return Estimate(
        "heal", what, context.machine.process + 2 * max(size, context.copied) + activations, 2 * size, seconds
    )


def refuse(step: Heal, context: Context) -> None:
    family = architectures.dense(context.base.config, "heal")
    if family.normed and step.repair:
        raise Refused(
            f"{family.name} has a norm between down_proj and the stream, and least squares fit down_proj to the "
            "stream: say `repair: false` and some `steps`"
        )
    for name in ("calibration", "evaluate"):
        part = replace(getattr(context.recipe, name), samples=HELD, tokens=step.tokens)
        context.refuse_too_little(part, f"heal: {name}")


def sentence(options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    squares = f", after least squares {notes['repair']['left']:.3f}" if "repair" in notes else ""
    return (
        f"Log-perplexity above the original's: {notes['lost']:.3f} after pruning{squares}, {notes['left']:.3f} "
        f"in the end, after {notes['trained_tokens']:,} tokens of distillation."
    )


STEP = StepKind(Heal, "optimize.steps.prune.heal", estimate, refuse, sentence, compares=True, reads_evaluation=True)
