"""The bags that a detector ranks scores in: of each score those of the reference and of what came since, sorted."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

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
        self._margin = margin

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
    ) -> tuple[Floats, Floats]:
        """(n, k) smoothed conformal p-values of rows (n, k), which the bags take in one after another; of a score with
        a margin the least that it can be, and the most. lots: of each row."""
        sizes = np.minimum(np.arange(self._size, self._size + len(scores)), self._capacity)[:, None] + 1
        least, most = list[float](), list[float]()
        for i, (entries, margin) in enumerate(zip(self._bags, self._margin.tolist(), strict=True)):
            bag = array("f", entries[: self._size].tobytes())
            low, high = (scores[:, i] - self._margin[i]).tolist(), (scores[:, i] + self._margin[i]).tolist()
            for place, score in enumerate(scores[:, i].tolist()):
                at = bisect_left(bag, score)
                if margin:
                    least.append(bisect_left(bag, low[place]))
                    most.append(bisect_right(bag, high[place]) + 1)
                else:
                    upto = bisect_right(bag, score, at) if at < len(bag) and bag[at] == score else at
                    least.append(at + float(lots[place][0][i]) * (upto - at + 1))
                    most.append(least[-1])
                    at = upto
                bag.insert(at, score)
                if (out := lots[place][1][i]) is not None:
                    del bag[out]
            entries[: len(bag)] = np.frombuffer(bag, np.float32)
        self._size = min(self._size + len(scores), self._capacity)
        p = (np.array(counts, np.float64).reshape(len(self), -1).T / sizes for counts in (least, most))
        return next(p), next(p)
