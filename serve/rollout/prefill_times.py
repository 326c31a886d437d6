"""The time until a first token, held against what the live version needs for as many computed tokens.

A version with few requests finds less of their prompts in its prefix cache, so its first tokens come later although it
is no slower. Requests are therefore compared by the tokens that were computed for them. They fall into bins of similar
counts; ln of the live version's seconds is modelled as the load of the moment plus a mean for each bin. A request's
value is its seconds as a multiple of its bin's: from the past alone, and the same for both versions, so that whatever
draws between them makes no difference to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

State: TypeAlias = dict[str, NDArray]

# A bin's largest count over its smallest; so many tokens more or less cost nothing.
RATIO, FREE = 1.2, 16
# Requests of the live version that a bin needs before it is compared with, and that its mean remembers.
LEAST, MEMORY = 16, 400
# How fast the load of the moment is forgotten.
LOAD_WEIGHT = 0.1


class PrefillTimes:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._load: float | None = None
        self._counts: dict[int, int] = {}
        self._means: dict[int, float] = {}

    def relative(self, seconds: float, computed: int, *, canary: bool) -> float | None:
        """`seconds` as a multiple of the live version's for so many tokens; None while too little is known of those."""
        if seconds <= 0:
            return None
        size = _bin(computed)
        known = self._counts.get(size, 0) >= LEAST
        value = seconds / math.exp(self._means[size]) if known else None
        if not canary:
            self._learn(size, math.log(seconds))
        return value

    def _learn(self, size: int, log_seconds: float) -> None:
        if self._load is None:
            self._load = log_seconds
        count = self._counts[size] = min(self._counts.get(size, 0) + 1, MEMORY)
        mean = self._means.get(size, 0.0)
        mean += (log_seconds - self._load - mean) / count
        self._means[size] = mean
        # A bin that is new says nothing about the load.
        if count > 1:
            self._load += LOAD_WEIGHT * (log_seconds - mean - self._load)

    def state(self) -> State:
        bins = sorted(self._counts)
        rows = [(size, self._counts[size], self._means[size]) for size in bins]
        load = math.nan if self._load is None else self._load
        return {"bins": np.array(rows, np.float64).reshape(-1, 3), "load": np.array(load)}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state()` was."""
        load = float(state["load"])
        self._load = None if math.isnan(load) else load
        rows = state["bins"].tolist()
        self._counts = {int(size): int(count) for size, count, _ in rows}
        self._means = {int(size): mean for size, _, mean in rows}


def _bin(computed: int) -> int:
    return round(math.log(max(computed, 0) + FREE) / math.log(RATIO))
