"""What merging adapters into the base needs."""

from __future__ import annotations

from optimize.options import Merge
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate


def estimate(step: Merge, context: Context) -> Estimate:
    base = context.base
    what = f"{', '.join(step.adapters)} into the base's weights, in fp32, shard by shard"
    if base.quantization:
        what = f"take {base.folder.name} apart into full weights, then {what}"
    largest = max(entry.bytes for entry in base.entries.values())
    return Estimate("merge", what, PROCESS + 6 * largest + 4 * base.bytes, base.bytes, STARTING + base.bytes / 2e8 + 10)


def refuse(step: Merge, context: Context) -> None:
    """Merging takes every adapter that fits the base."""
