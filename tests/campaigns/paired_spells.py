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
# With fewer pairs no interval of ranks has 95 %.
FEWEST = 6


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
    """Of the logarithms of each pair's ratio (neighbours, as `order` has them): the median of the means of every two,
    and the interval that Wilcoxon's signed-rank test leaves. A spell that something else disturbed weighs no more in it
    than any other. (J. L. Hodges and E. L. Lehmann, Estimates of location based on rank tests, 1963)"""
    logs = []
    for one, other in zip(spells[::2], spells[1::2], strict=False):
        on, off = (one, other) if one.on else (other, one)
        assert on.on and not off.on, "a pair is a spell with it and one without"
        logs.append(math.log(measure(on) / measure(off)))
    n = len(logs)
    if n < FEWEST:
        raise ValueError(f"an interval takes {FEWEST} pairs of spells, not {n}")
    means = sorted((one + other) / 2 for at, one in enumerate(logs) for other in logs[at:])
    outside = int(n * (n + 1) / 4 - 1.96 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24) - 0.5)
    low, high = means[outside], means[-1 - outside]
    return Cost(math.exp(statistics.median(means)), math.exp(low), math.exp(high), n)
