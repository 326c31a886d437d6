"""What pruning needs, and which models and adapters it cannot be done to."""

from __future__ import annotations

from optimize.checkpoint import architectures
from optimize.checkpoint.linears import undivided
from optimize.errors import Refused
from optimize.options import Merge, Prune, pattern_of
from optimize.steps.planning import FLOPS, PROCESS, STARTING, Context, Estimate

ZEROS = (
    "zeros buy neither size nor speed in today's vLLM: the checkpoint stays dense, and its kernels for 2:4 are gone; "
    "`layers`, `mlp` and `vocabulary` make a model smaller and faster"
)


def estimate(step: Prune, context: Context) -> Estimate:
    base = context.base
    size = base.bytes
    seconds = STARTING + base.bytes / 5e8
    memory = PROCESS + base.bytes + 50_000_000
    passes = 3 * context.calibration_tokens * 2 * base.parameters / FLOPS
    if step.vocabulary:
        what = f"keep the {step.vocabulary} most used tokens" if step.vocabulary != "used" else "keep the used tokens"
        return Estimate("prune", what, memory, size, seconds + 10)
    if not step.zeros:
        what = f"drop {step.layers} layers by {step.choose} choice" if step.layers else f"MLP width to {step.mlp:.1%}"
        return Estimate("prune", what, memory, size, seconds + passes)
    what = f"{step.pattern or f'{step.sparsity:.0%}'} zeros by {step.method}"
    memory += context.calibration_tokens * context.hidden * 4 + 12 * context.widest**2 + size
    return Estimate("prune", what, memory, size, seconds + passes + base.parameters / 4e6, ZEROS)


def refuse(step: Prune, context: Context) -> None:
    base = context.base
    if step.zeros or step.mlp < 1:
        architectures.dense(base.config, "prune: mlp" if step.mlp < 1 else "prune: sparsity")
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
