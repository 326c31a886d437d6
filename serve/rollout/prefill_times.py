"""The time until a first token, held against what the live version needs for as many computed tokens.

A version with few requests finds less of their prompts in its prefix cache, so its first tokens come later although it
is no slower. Requests are therefore compared by the tokens that were computed for them. ln of the live version's
seconds is modelled as the load of the moment plus a curve over the number of tokens: straight lines between knots. A
request's value is its seconds as a multiple of the model's: from the past alone, and the same for both versions, so
that whatever draws between them makes no difference to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

State: TypeAlias = dict[str, NDArray]
Knots: TypeAlias = tuple[tuple[int, float], tuple[int, float]]

# From knot to knot; so many tokens more or less cost nothing.
RATIO, FREE = 1.5, 16
# Requests of the live version that a knot needs before it is compared with, and that it remembers.
LEAST, MEMORY = 8.0, 400.0
# How fast the load of the moment is forgotten.
LOAD_WEIGHT = 0.1
# A knot that weighs less than this in a value need not be known.
NEGLIGIBLE = 0.05


class PrefillTimes:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._load: float | None = None
        self._counts: dict[int, float] = {}
        self._heights: dict[int, float] = {}

    def relative(self, seconds: float, computed: int, *, canary: bool) -> float | None:
        """`seconds` as a multiple of the live version's for so many tokens; None while too little is known of those."""
        if seconds <= 0:
            return None
        knots = _knots(computed)
        known = all(self._counts.get(knot, 0) >= LEAST for knot, part in knots if part >= NEGLIGIBLE)
        value = seconds / math.exp(self._curve(knots) + (self._load or 0.0)) if known else None
        if not canary:
            self._learn(knots, math.log(seconds))
        return value

    def _curve(self, knots: Knots) -> float:
        return sum(part * self._heights.get(knot, 0.0) for knot, part in knots)

    def _learn(self, knots: Knots, log_seconds: float) -> None:
        if self._load is None:
            self._load = log_seconds
        seen = all(self._counts.get(knot, 0) >= LEAST for knot, _ in knots)
        error = log_seconds - self._load - self._curve(knots)
        for knot, part in knots:
            count = self._counts[knot] = min(self._counts.get(knot, 0.0) + part, MEMORY)
            self._heights[knot] = self._heights.get(knot, 0.0) + (part / count * error if count else 0.0)
        # What is new says nothing about the load.
        if seen:
            self._load += LOAD_WEIGHT * (log_seconds - self._curve(knots) - self._load)

    def state(self) -> State:
        rows = [(knot, self._counts[knot], self._heights[knot]) for knot in sorted(self._counts)]
        load = math.nan if self._load is None else self._load
        return {"knots": np.array(rows, np.float64).reshape(-1, 3), "load": np.array(load)}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state()` was."""
        load = float(state["load"])
        self._load = None if math.isnan(load) else load
        rows = state["knots"].tolist()
        self._counts = {int(knot): count for knot, count, _ in rows}
        self._heights = {int(knot): height for knot, _, height in rows}


def _knots(computed: int) -> Knots:
    """The knots on both sides, and what part each has."""
    place = math.log(max(computed, 0) + FREE) / math.log(RATIO)
    below = math.floor(place)
    part = place - below
    return ((below, 1 - part), (below + 1, part))
