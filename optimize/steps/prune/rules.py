"""What pruning needs, and which models and adapters it cannot be done to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from optimize.checkpoint import architectures
from optimize.checkpoint.linears import undivided
from optimize.errors import RecipeError, Refused
from optimize.options import Step
from optimize.steps.kind import StepKind
from optimize.steps.merge.rules import Merge
from optimize.steps.planning import BATCH, Context, Estimate, cubes, passing, summing, weight_bytes, writing

WATCHED = 16  # windows that influence is measured on
TRIED = 4  # windows that a choice is tried on
SPARE = 3  # candidates beyond the layers to drop
COMPARED = 6  # passes over the logits of a try
ZEROS = (
    "zeros buy neither size nor speed in today's vLLM: the checkpoint stays dense, and its kernels for 2:4 are gone; "
    "`layers`, `mlp` and `vocabulary` make a model smaller and faster"
)


class Prune(Step, frozen=True, kw_only=True, tag="prune"):
    """Whole layers (`greedy`: those that calibration text misses least), a share of the MLP's width by activation,
    zeros, or a smaller vocabulary.

    `sparsity` is a share of zeros, `pattern` is N:M (2:4 keeps two of four); `vocabulary` is how many tokens stay, or
    `used` for those of the calibration text.
    """

    layers: int = 0
    choose: Literal["greedy", "influence"] = "greedy"
    mlp: float = 1.0
    sparsity: float = 0.0
    pattern: str = ""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    vocabulary: int | Literal["used"] = 0

    retired: ClassVar[Mapping[str, str]] = {
        "choose": "`choose: influence` does nothing any more: dropped is what the calibration text misses least"
    }

    @property
    def zeros(self) -> bool:
        return bool(self.sparsity or self.pattern)

    def check(self, where: str) -> None:
        wishes = [bool(self.layers) or self.mlp != 1.0, self.zeros, bool(self.vocabulary)]
        if sum(wishes) == 0:
            raise RecipeError(
                f"{where}: say `layers: N` to drop layers, `mlp: 0.875` to narrow the MLP, `vocabulary: N` to trim it, "
                "or `sparsity: 0.5` or `pattern: 2:4` for zeros"
            )
        if sum(wishes) > 1:
            raise RecipeError(
                f"{where}: structure, zeros and vocabulary are three steps; give each a `- prune:` of its own"
            )
        if self.layers < 0 or not 0 < self.mlp <= 1:
            raise RecipeError(f"{where}: layers is a count and mlp a share above 0 and at most 1")
        if self.vocabulary != "used" and self.vocabulary < 0:
            raise RecipeError(f"{where}: vocabulary is how many tokens stay, or `used`")
        if self.zeros:
            self._check_zeros(where)

    def _check_zeros(self, where: str) -> None:
        if self.sparsity and self.pattern:
            raise RecipeError(f"{where}: `sparsity` or `pattern`, not both; 2:4 is half of the weights")
        if not self.pattern and not 0 < self.sparsity < 1:
            raise RecipeError(f"{where}: sparsity is a share above 0 and below 1, not {self.sparsity}")
        if self.pattern and not re.fullmatch(r"[1-9]\d?:(4|8|16|32)", self.pattern):
            raise RecipeError(f"{where}: a pattern is N:M with M of 4, 8, 16 or 32, such as 2:4, not {self.pattern!r}")
        pattern = pattern_of(self.pattern)
        if pattern and pattern[0] >= pattern[1]:
            raise RecipeError(f"{where}: {self.pattern} leaves no zeros; 2:4 keeps two of four")


def pattern_of(pattern: str) -> tuple[int, int] | None:
    """(2, 4) from "2:4": two of four stay."""
    kept, colon, of = pattern.partition(":")
    return (int(kept), int(of)) if colon else None


def estimate(step: Prune, context: Context) -> Estimate:
    base, machine = context.base, context.machine
    size = base.bytes
    seconds = machine.calibration_text + machine.opening + writing(base.bytes)
    memory = machine.process + context.copied
    if step.vocabulary:
        what = f"keep the {step.vocabulary} most used tokens" if step.vocabulary != "used" else "keep the used tokens"
        return Estimate("prune", what, machine.process + 8 * context.outside_layers, size, seconds + 2)
    if not step.zeros:
        what = f"drop {step.layers} layers by greedy choice" if step.layers else f"MLP width to {step.mlp:.1%}"
        # A batch's logits, and what it is inside a layer.
        batch = min(BATCH, context.recipe.calibration.samples) * context.recipe.calibration.tokens
        memory += batch * (weight_bytes() * context.vocabulary + 12 * context.widest)
        return Estimate("prune", what, memory, size, seconds + _chosen(step, context))
    what = f"{step.pattern or f'{step.sparsity:.0%}'} zeros by {step.method}"
    memory = machine.process + context.copied_by_layer + passing(context)
    seconds += context.calibration_tokens * context.layers_seconds + machine.zero * context.linears
    if step.method != "magnitude":
        summed, hessians = summing(context)
        seconds, memory = seconds + summed, memory + hessians + 8 * context.widest**2
    if step.method == "sparsegpt":  # a factor, the inverse and its factor; what a column makes up for in those after it
        seconds += machine.product32 * (cubes(context) + context.products / 2)
    return Estimate("prune", what, memory, size, seconds, ZEROS)


def _chosen(step: Prune, context: Context) -> float:
    """Seconds until layers or channels are chosen: each of the least layers is tried, until as many are gone."""
    samples, tokens = context.recipe.calibration.samples, context.recipe.calibration.tokens
    watched = context.token_seconds * tokens * (min(WATCHED, samples) if step.layers else samples)
    watched *= 2 if step.layers and step.mlp < 1 else 1
    tries = sum(step.layers + SPARE - gone for gone in range(step.layers))
    # What is the same as in the try before is not computed again; logits are, and compared with the text.
    answered = context.token_seconds - context.layers_seconds + COMPARED * context.machine.number * context.vocabulary
    return watched + tries * (0.45 * context.layers_seconds + answered) * tokens * min(TRIED, samples)


def refuse(step: Prune, context: Context) -> None:
    base = context.base
    if step.zeros or step.mlp < 1:
        architectures.dense(base.config, "prune: mlp" if step.mlp < 1 else "prune: sparsity")
    if step.vocabulary:
        architectures.readable(base.config, base.shapes, "prune: vocabulary")
    else:
        context.refuse_too_little(context.recipe.calibration, "calibration")
    if step.layers:
        architectures.of(base.config, "prune: layers")
        if int(base.config.get("decoder_sparse_step") or 1) > 1:
            raise Refused(
                "the model has experts in every second layer or fewer, by number, and layers cannot be dropped"
            )
    if step.layers >= context.layers:
        raise Refused(f"the model has {context.layers} layers, so {step.layers} cannot be dropped; drop fewer")
    if step.mlp < 1 and not any(".mlp.down_proj.weight" in name for name in base.shapes):
        raise Refused("the MLP of this model is not made of gate_proj, up_proj and down_proj; narrow it another way")
    pattern = pattern_of(step.pattern)
    if pattern and (widths := undivided(base, pattern[1])):
        raise Refused(f"{step.pattern} does not divide layers of width {widths}; take another M")
    if step.vocabulary != "used" and step.vocabulary >= context.vocabulary:
        raise Refused(
            f"the model has {context.vocabulary} tokens, so keeping {step.vocabulary} trims nothing; keep fewer"
        )
    merged = {name for other in context.recipe.steps if isinstance(other, Merge) for name in other.adapters}
    living = sorted(set(context.adapters) - merged)
    if living and not step.zeros and not step.vocabulary:
        raise Refused(
            f"pruning changes the layers that the adapter {living[0]!r} was trained on: "
            "merge it first, or leave it out of `adapters:` and train it again on the result"
        )


def sentence(options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    return f"Dropped: layers {', '.join(map(str, notes['dropped']))}." if notes.get("dropped") else ""


STEP = StepKind(Prune, "optimize.steps.prune.prune", estimate, refuse, sentence)
