"""What merging adapters into the base needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optimize.checkpoint import architectures
from optimize.errors import Refused
from optimize.options import Merge
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate

SPEED = 5e7  # bytes a second of a base that is merged into and checked, two cores


def estimate(step: Merge, context: Context) -> Estimate:
    base = context.base
    what = f"{', '.join(step.adapters)} into the base's weights, in fp32, shard by shard"
    if base.quantization:
        what = f"take {base.folder.name} apart into full weights, then {what}"
    # The sum and its parts in fp32; then the check, a layer in fp32 twice, beside embedding and output layer.
    summed = 12 * max(math.prod(shape) for name, shape in base.shapes.items() if _changed(name, step, context))
    memory = PROCESS + max(summed, 8 * context.largest_layer + 4 * context.outside_layers)
    return Estimate("merge", what, memory, base.bytes, STARTING + base.bytes / SPEED)


def refuse(step: Merge, context: Context) -> None:
    base = context.base
    family = architectures.known(base.config)
    for name in step.adapters:
        config = context.adapters.get(name, {})
        one_side = {"embed_tokens", "lm_head"} & {*(config.get("modules_to_save") or []), *_targets(config)}
        if family and family.tied_only and one_side:
            raise Refused(
                f"the adapter {name!r} changes {sorted(one_side)[0]}, and vLLM has one matrix for embedding and output "
                f"layer of {family.name}: train it on the layers alone"
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
