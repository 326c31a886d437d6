"""The last raw rows of a signal, so that they can become its reference: a ring, numbers only."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]


class RecentRows:
    """rows: (n, columns) to begin with, oldest first. The memory is taken with the first row."""

    def __init__(self, columns: int, rows: Rows | None = None) -> None:
        self._columns = columns
        self._ring = np.zeros((0, columns), np.float32)
        self._count = 0  # of rows that came
        if rows is not None and len(rows):
            self._ring, self._count = np.array(rows, np.float32), len(rows)
            if self._ring.shape[1] != columns:
                raise ValueError(f"recent rows have {self._ring.shape[1]} numbers, not {columns}")

    def __len__(self) -> int:
        return min(self._count, len(self._ring))

    def extend(self, rows: Rows, most: int) -> None:
        """Keep these rows (n, columns), the newest last, of at most `most`."""
        if len(self._ring) != most:
            self._resize(most)
        latest = rows[-most:]
        self._count += len(rows)
        begin = (self._count - len(latest)) % most
        ahead = min(len(latest), most - begin)
        # To index the places of all of them takes ten times as long.
        self._ring[begin : begin + ahead] = latest[:ahead]
        self._ring[: len(latest) - ahead] = latest[ahead:]

    def append(self, row: Rows, most: int) -> None:
        """Keep one row, as `extend` does."""
        if len(self._ring) != most:
            self._resize(most)
        self._ring[self._count % most] = row
        self._count += 1

    def last(self, count: int | None = None) -> Rows:
        """(n, columns): a copy of the newest `count` rows, or of all, oldest first."""
        n = len(self) if count is None else max(0, min(count, len(self)))
        places = np.arange(self._count - n, self._count) % max(len(self._ring), 1)
        return self._ring[places]

    def clear(self) -> None:
        """Forget all of them, and give the memory back."""
        self._ring, self._count = np.zeros((0, self._columns), np.float32), 0

    def _resize(self, most: int) -> None:
        rows = self.last(most)
        self._ring = np.zeros((most, self._columns), np.float32)
        self._ring[: len(rows)] = rows
        self._count = len(rows)


def all_finite(rows: NDArray[np.float32]) -> bool:
    """No number of float32 rows is infinite or none: in float64 their sum cannot overflow."""
    return math.isfinite(np.add.reduce(rows, axis=None, dtype=np.float64))


def fade_in(sums: NDArray[np.float64], rows: Rows, centre: Rows, fade: float) -> None:
    """Add rows (n, columns), less their centre, to the sums of those before (columns,), which fade with each."""
    for moved in rows - centre:
        sums *= fade
        sums += moved
