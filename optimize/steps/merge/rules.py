"""What merging adapters into the base needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimize.checkpoint import architectures
from optimize.errors import Refused
from optimize.options import Merge
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate


def estimate(step: Merge, context: Context) -> Estimate:
    base = context.base
    what = f"{', '.join(step.adapters)} into the base's weights, in fp32, shard by shard"
    if base.quantization:
        what = f"take {base.folder.name} apart into full weights, then {what}"
    largest = max(entry.elements for entry in base.entries.values())
    # The sum and its parts in fp32; then a layer in fp32 twice, beside embedding and output layer.
    memory = PROCESS + max(12 * largest, 8 * context.largest_layer + 4 * context.outside_layers)
    return Estimate("merge", what, memory, base.bytes, STARTING + base.bytes / 2e8 + 10)


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


def _targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else list(targets)
