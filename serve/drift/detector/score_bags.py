"""The bags that a detector ranks scores in: of each score those of the reference and of what came since, sorted."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.drift.detector.bets import Floats


class ScoreBags:
    """columns: (k, m) float32, each sorted. margin: (k,) by how much each score may move unseen.

    capacity: entries that a bag holds, at least m; then each row that comes takes one entry's place.
    """

    def __init__(self, columns: NDArray[np.float32], capacity: int, margin: NDArray[np.float32]) -> None:
        k, self._size = columns.shape
        self._bags = np.empty((k, capacity + 1), np.float32)
        self._bags[:, : self._size] = columns
        self._capacity = capacity
        self._bound = np.flatnonzero(margin)
        self._margin = margin[self._bound]

    def __len__(self) -> int:
        """How many scores there are."""
        return len(self._bags)

    def sorted(self) -> NDArray[np.float32]:
        """(k, m): a copy."""
        return self._bags[:, : self._size].copy()

    def lots(self, rng: np.random.Generator, ahead: int) -> tuple[Floats, Sequence[int | None]]:
        """The random numbers of the row that comes after `ahead` others: where its ties lie, and which of a full bag's
        entries leaves, in the order of the sorted bag."""
        k = len(self._bags)
        ties = rng.random(k)
        if self._size + ahead < self._capacity:
            return ties, [None] * k
        # At random among all, the new one included: if age decided, ranks would say something about later ones.
        return ties, rng.integers(self._capacity + 1, size=k).tolist()

    def rank(
        self, scores: NDArray[np.float32], lots: Sequence[tuple[Floats, Sequence[int | None]]]
    ) -> tuple[Floats, tuple[Floats, Floats] | None]:
        """(n, k) smoothed conformal p-values of rows (n, k), which the bags take in one after another; and the least
        and the most that they can be where there are margins. lots: of each row."""
        sizes = np.minimum(np.arange(self._size, self._size + len(scores)), self._capacity)[:, None] + 1
        leave = zip(*(out for _, out in lots), strict=True)
        within = self._margins(scores)
        less, upto = list[int](), list[int]()
        for i, (entries, column, left) in enumerate(zip(self._bags, scores.T.tolist(), leave, strict=True)):
            seen, bag = within.get(i), array("f", entries[: self._size].tobytes())
            for score, out in zip(column, left, strict=True):
                if seen is not None:
                    seen.see(bag)
                place = bisect_left(bag, score)
                less.append(place)
                if place < len(bag) and bag[place] == score:
                    place = bisect_right(bag, score, place)
                upto.append(place)
                bag.insert(place, score)
                if out is not None:
                    del bag[out]
            entries[: len(bag)] = np.frombuffer(bag, np.float32)
        self._size = min(self._size + len(scores), self._capacity)
        below, above = (np.array(counts).reshape(len(self), -1).T for counts in (less, upto))
        p = (below + np.array([ties for ties, _ in lots]) * (above - below + 1)) / sizes
        if not within:
            return p, None
        least, most = p.copy(), p.copy()
        for i, seen in within.items():
            least[:, i], most[:, i] = np.array(seen.less) / sizes[:, 0], np.array(seen.upto) / sizes[:, 0]
        return p, (least, most)

    def _margins(self, scores: NDArray[np.float32]) -> dict[int, _Margin]:
        values = scores[:, self._bound]
        low, high = (values - self._margin).T.tolist(), (values + self._margin).T.tolist()
        return {i: _Margin(low[place], high[place]) for place, i in enumerate(self._bound.tolist())}


class _Margin:
    """Of one score, how many of its bag lie below the least, and with the new one not above the most, that it may be
    taken for."""

    def __init__(self, low: Iterable[float], high: Iterable[float]) -> None:
        self._ends = zip(low, high, strict=True)
        self.less, self.upto = list[int](), list[int]()

    def see(self, bag: array[float]) -> None:
        """Look at the bag before the next row is in it."""
        low, high = next(self._ends)
        self.less.append(bisect_left(bag, low))
        self.upto.append(bisect_right(bag, high) + 1)
