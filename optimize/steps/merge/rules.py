"""What merging adapters into the base needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from optimize.checkpoint import architectures
from optimize.errors import RecipeError, Refused
from optimize.options import Step
from optimize.steps.kind import StepKind
from optimize.steps.planning import LOADED, Context, Estimate, writing

IMPORTS = 1.5  # seconds of PEFT's own


class Merge(Step, frozen=True, kw_only=True, tag="merge"):
    """LoRA adapters into the base's weights, one after another; into a quantized base only with `requantize`."""

    reads_text: ClassVar[bool] = False
    adapters: tuple[str, ...]
    weights: tuple[float, ...] = ()
    requantize: bool = False

    @property
    def consumed(self) -> tuple[str, ...]:
        return self.adapters

    def check(self, where: str) -> None:
        check_weights(self, where)

    def check_order(self, where: str, before: Sequence[Step], later: Sequence[Step]) -> None:
        if self.requantize and not any(step.quantizes for step in later):
            raise RecipeError(f"{where}: requantize wants a quantize step after it")
        super().check_order(where, before, later)


class Weighted(Protocol):
    """A step over adapters with weights."""

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def weights(self) -> tuple[float, ...]: ...


def check_weights(step: Weighted, where: str) -> None:
    """RecipeError when adapters and their weights do not go together."""
    if not step.adapters:
        raise RecipeError(f"{where}: name at least one adapter")
    if step.weights and len(step.weights) != len(step.adapters):
        raise RecipeError(f"{where}: {len(step.weights)} weights for {len(step.adapters)} adapters")


def estimate(step: Merge, context: Context) -> Estimate:
    base = context.base
    what = f"{', '.join(step.adapters)} into the base's weights, in fp32, shard by shard"
    if base.quantization:
        what = f"take {base.folder.name} apart into full weights, then {what}"
    # The sum and its parts in fp32; then the check, a layer in fp32 twice, beside embedding and output layer.
    summed = 12 * max(math.prod(shape) for name, shape in base.shapes.items() if _changed(name, step, context))
    memory = context.machine.process + max(summed, 8 * context.largest_layer + 4 * context.outside_layers)
    # An output layer of its own, and the embedding with it, are compared too.
    compared = context.linears if base.tied else context.weights
    seconds = IMPORTS + 2 * context.machine.opening + context.machine.merging * compared
    seconds += 2 * LOADED * context.machine.number * context.weights  # both are opened in fp32
    return Estimate("merge", what, memory, base.bytes, seconds + writing(base.bytes))


def refuse(step: Merge, context: Context) -> None:
    base = context.base
    family = architectures.known(base.config)
    saved: dict[str, str] = {}
    for at, name in enumerate(step.adapters):
        config = context.adapters.get(name, {})
        refuse_unmerged(name, config)
        modules = list(config.get("modules_to_save") or [])
        replaces = "a norm (DoRA)" if config.get("use_dora") else f"{modules[0]} (modules_to_save)" if modules else ""
        if replaces and (step.weights or (1.0,) * len(step.adapters))[at] != 1:
            raise Refused(f"the adapter {name!r} replaces {replaces}: it cannot be weighted by {step.weights[at]:g}")
        if config.get("use_dora") and at:
            raise Refused(
                f"the adapter {name!r} is DoRA, whose norm is that of the base alone: name it first, or in a merge "
                "step of its own"
            )
        if twice := sorted(set(modules) & set(saved)):
            raise Refused(
                f"the adapters {saved[twice[0]]!r} and {name!r} both replace {twice[0]} (modules_to_save), and the "
                "model has room for one: leave one of them out"
            )
        saved |= dict.fromkeys(modules, name)
        one_side = {"embed_tokens", "lm_head"} & {*(config.get("modules_to_save") or []), *_targets(config)}
        if family and family.tied_only and one_side:
            raise Refused(
                f"the adapter {name!r} changes {sorted(one_side)[0]}, and vLLM has one matrix for embedding and output "
                f"layer of {family.name}: train it on the layers alone"
            )


def refuse_unmerged(name: str, config: Mapping[str, Any]) -> None:
    """What an adapter may have that no base has a place for."""
    if config.get("task_type") == "SEQ_CLS":
        raise Refused(
            f"the adapter {name!r} classifies by a head (SEQ_CLS), for which a model that generates has no place: "
            "push it as it is, and it answers /v1/classify"
        )
    if config.get("trainable_token_indices"):
        raise Refused(
            f"the adapter {name!r} has rows of single tokens (trainable_token_indices), which are not merged: "
            "push it as it is, or train embed_tokens whole (modules_to_save)"
        )


def _changed(name: str, step: Merge, context: Context) -> bool:
    """Whether an adapter may change the tensor; an embedding is changed only by one that says so."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module not in ("embed_tokens", "lm_head"):
        return True
    configs = [context.adapters.get(adapter, {}) for adapter in step.adapters]
    return any(module in [*(config.get("modules_to_save") or []), *_targets(config)] for config in configs)


def _targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else list(targets)


def sentence(options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    return (
        f"Merged: logits at most {notes['logits_off']:g} from base + adapters in fp32, KL "
        f"{notes['kl_to_base_plus_adapter']:g}; weights at most {notes['weights_off_in_last_places']:g} of bf16's "
        "last place from the exact ones (rounding to the nearest is 0.5)."
    )


STEP = StepKind(Merge, "optimize.steps.merge.merge", estimate, refuse, sentence, worst=("merge_kl",))
