"""How many more requests a proof will take, from how it has grown so far: a random walk that has to reach a height.

After n blocks with increments of mean m and standard deviation s, a walk that is d short takes about d / m blocks more.
The number varies by s * sqrt(d) / m^1.5 (the first passage of a Wiener process with drift), and m itself is known to
within s / sqrt(n); its logarithm is taken for normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Fewer blocks say nothing yet.
LEAST_BLOCKS = 6
# Standard normal deviates on both sides: four of five.
DEVIATES = 1.2816
# A walk that is there is as far away as this; an estimate that may be off by more than e^5 says no more.
LEAST_SHORT, MOST_ERROR = 0.1, 4.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Further requests of both versions together until the proof: a range for four times of five, and its middle.

    inf: not in sight, by what was seen so far.
    """

    low: float
    expected: float
    high: float

    def scaled(self, factor: float) -> Forecast:
        return Forecast(self.low * factor, self.expected * factor, self.high * factor)


PROVED = Forecast(0.0, 0.0, 0.0)
UNKNOWN = Forecast(math.inf, math.inf, math.inf)


def latest(forecasts: Iterable[Forecast | None]) -> Forecast | None:
    """Until all of them are proved; None while one of them cannot be told yet."""
    known = list(forecasts)
    rows = [forecast for forecast in known if forecast is not None]
    if not rows or len(rows) < len(known):
        return None
    return Forecast(*(max(getattr(row, name) for row in rows) for name in ("low", "expected", "high")))


class ProofGrowth:
    """The increments of several bets on one hypothesis, block by block; the proof is the mean of the bets."""

    def __init__(self, bets: int) -> None:
        self._blocks = 0
        self._sum = np.zeros(bets)
        self._squares = np.zeros(bets)

    def add(self, increments: NDArray[np.float64]) -> None:
        """ln of what each bet won in one block."""
        self._blocks += 1
        self._sum += increments
        self._squares += increments**2

    def forecast(self, wealth: NDArray[np.float64], threshold: float) -> Forecast | None:
        """Blocks until the mean of the bets, whose ln is `wealth` now, reaches e^threshold."""
        if self._blocks < LEAST_BLOCKS:
            return None
        mean = self._sum / self._blocks
        spread = np.sqrt(np.maximum(self._squares / self._blocks - mean**2, 0.0))
        rises = mean > 0
        if not rises.any():
            return UNKNOWN
        # One bet alone must make up for all others.
        short = np.maximum(threshold + math.log(len(wealth)) - wealth, LEAST_SHORT)
        mean = mean[rises]
        spread = spread[rises]
        short = short[rises]
        first = int(np.argmin(short / mean))
        expected = float(short[first] / mean[first])
        # The relative deviations of the walk and of its mean, together.
        error = float(spread[first] * np.sqrt(1 / (mean * short) + 1 / (self._blocks * mean**2))[first])
        factor = math.exp(DEVIATES * min(error, MOST_ERROR))
        return Forecast(expected / factor, expected, expected * factor)

    def state(self) -> NDArray[np.float64]:
        """(3, bets): blocks, sums and sums of squares."""
        return np.vstack([np.full_like(self._sum, self._blocks), self._sum, self._squares])

    def restore(self, state: NDArray[np.float64]) -> None:
        """Go on where `state()` was."""
        blocks, self._sum, self._squares = (np.array(row) for row in state)
        self._blocks = int(blocks[0])
