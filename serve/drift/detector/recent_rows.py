"""The last rows of numbers: those that may become a reference, and ranks of late."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]


def latest(rows: deque[Rows], columns: int, count: int | None = None) -> Rows:
    """(n, columns): the newest `count` of them, or all, oldest first."""
    first = 0 if count is None else max(len(rows) - max(count, 0), 0)
    return np.array(list(islice(rows, first, None)), np.float32).reshape(-1, columns)


def all_finite(rows: Rows) -> bool:
    """No number of float32 rows is infinite or none: in float64 their sum cannot overflow."""
    return math.isfinite(np.add.reduce(rows, axis=None, dtype=np.float64))
