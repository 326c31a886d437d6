"""What part of a GPU each engine of a server takes, so that several fit on one.

vLLM takes `gpu_memory_utilization` of each of its GPUs, whatever else is on it: two engines with vLLM's own .92 never
fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve.errors import ConfigError
from serve.models.gpus import Card
from serve.models.hardware import GIB, gib

# vLLM's own default, and what is left of a card for all engines on it together.
WHOLE = 0.92
# On each GPU beside weights, slots and KV cache: CUDA's context, activations of a full batch, graphs.
ENGINE = 2 * GIB
# Less KV cache than that is no use to anybody.
LEAST_KV_CACHE = GIB


@dataclass(frozen=True, slots=True)
class Wanted:
    """An engine: the GPUs that it takes, by number, and bytes on each of them beside its KV cache (0: unknown).

    `part`: what its options say already.
    """

    name: str
    devices: tuple[int, ...]
    fixed: int = 0
    kv_cache: int = 0
    part: float | None = None

    @property
    def least(self) -> int:
        return (self.fixed + ENGINE if self.fixed else 0) + (self.kv_cache or LEAST_KV_CACHE)


def shares(wanted: Sequence[Wanted], cards: Sequence[Card]) -> list[float | None]:
    """A `gpu_memory_utilization` for each engine; None where it has its GPUs alone. ConfigError where they don't fit.

    cards: by number; without them every engine of a GPU gets an equal part.
    """
    crowded = {device for device in _devices(wanted) if sum(device in one.devices for one in wanted) > 1}
    parts: list[float | None] = []
    for engine in wanted:
        on = sorted(crowded.intersection(engine.devices))
        parts.append(
            engine.part if engine.part is not None or not on else min(_part(engine, d, wanted, cards) for d in on)
        )
    for device in sorted(crowded):
        _check(device, [one for one in wanted if device in one.devices], cards)
    return parts


def _devices(wanted: Iterable[Wanted]) -> set[int]:
    return {device for engine in wanted for device in engine.devices}


def _part(engine: Wanted, device: int, wanted: Sequence[Wanted], cards: Sequence[Card]) -> float:
    """What it needs, and as much of what is left as the others get whose KV cache may grow."""
    others = [one for one in wanted if device in one.devices]
    free = [one for one in others if one.part is None]
    left = WHOLE - sum(one.part or 0.0 for one in others)
    if device >= len(cards):
        return _down(left / len(free))
    total = cards[device].total
    rest = left * total - sum(one.least for one in free)
    growing = [one for one in free if not one.kv_cache]
    more = rest / len(growing) if not engine.kv_cache and growing else 0.0
    return _down((engine.least + more) / total) if engine.kv_cache == 0 else _up(engine.least / total)


def _check(device: int, engines: Sequence[Wanted], cards: Sequence[Card]) -> None:
    names = ", ".join(engine.name for engine in engines)
    given = sum(engine.part or 0.0 for engine in engines)
    free = [engine for engine in engines if engine.part is None]
    if given > 1.0 or (free and given >= WHOLE):
        raise ConfigError(
            f"the engines {names} share GPU {device}, and their gpu_memory_utilization adds up to {given:.2f}: lower "
            f"it, so that all engines of a GPU together take at most {WHOLE}, or give them GPUs of their own with "
            "device_ids"
        )
    if device >= len(cards) or not free:
        return
    total = cards[device].total
    if sum(engine.least for engine in free) > (WHOLE - given) * total:
        needs = ", ".join(f"{engine.name} {gib(engine.least)}" for engine in free)
        raise ConfigError(
            f"the engines {names} share GPU {device} with {gib(total)}, and do not fit: at least {needs} of "
            f"{gib(int((WHOLE - given) * total))}. Take smaller or quantized models, lower max_loras, or give "
            "them GPUs of their own with device_ids"
        )


def _down(part: float) -> float:
    return max(math.floor(part * 1000) / 1000, 0.001)


def _up(part: float) -> float:
    return math.ceil(part * 1000) / 1000
