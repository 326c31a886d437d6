"""What turning something on costs, from short spells with it and without it, taken in turns.

compared(spells, Spell.seconds_a_token)     # Cost(ratio=1.002, low=0.998, high=1.006, pairs=60)

A machine drifts by more than 1 % within minutes, so each spell is compared with its neighbour alone. The order within a
pair changes from pair to pair: what drifts steadily, cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Switched(Protocol):
    @property
    def on(self) -> bool: ...


S = TypeVar("S", bound=Switched)


@dataclass(frozen=True, slots=True)
class Cost:
    """How many times as much with it as without it, and its 95 % interval."""

    ratio: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{100 * (self.ratio - 1):+.2f} % (95 %: {100 * (self.low - 1):+.2f} to {100 * (self.high - 1):+.2f} %)"


def order(pairs: int) -> Iterator[bool]:
    """With it or without, spell by spell."""
    for number in range(pairs):
        yield from (True, False) if number % 2 else (False, True)


def compared(spells: Sequence[S], measure: Callable[[S], float]) -> Cost:
    """The mean over pairs of neighbours, as `order` has them, of the logarithm of their ratio."""
    logs = []
    for one, other in zip(spells[::2], spells[1::2], strict=False):
        on, off = (one, other) if one.on else (other, one)
        assert on.on and not off.on, "a pair is a spell with it and one without"
        logs.append(math.log(measure(on) / measure(off)))
    if len(logs) < 2:
        raise ValueError(f"an interval takes 2 pairs of spells, not {len(logs)}")
    mean, spread = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return Cost(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), len(logs))
