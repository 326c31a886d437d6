"""Directions in which live requests leave the reference, learned while they are tested.

A direction is a weighted sum of the normal scores of earlier requests' p-values: requests that lie high in a score
pull it there. Each request is first ranked along the directions in a bag of the reference and all earlier requests,
and then teaches. Those that taught are in the bag and lie a little farther along than a new one does, so that while
nothing changes a new one ranks lower than by chance, never higher. Bets that grow with the rank win less than nothing
by that; any other bet would win: histograms crossed a threshold of 100,000 after 29,000 requests on the mean. So only
rising bets are placed on directions, and `make drift-proof` measures what remains.

Three directions learn from every request and forget at different speeds. The fourth learns from a request by as much as
it raised the evidence, as in expectation maximization: with few foreign requests among many it learns from those.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.bets import CELLS, Floats, State, cells

# Half-lives: in requests, and the last in requests that raised the evidence.
HALF_LIVES = (16.0, 64.0, 256.0, 48.0)
_FADES = np.array([[0.5 ** (1 / half_life)] for half_life in HALF_LIVES])
# What is below so many standard errors in a direction is left out of it.
SHRINKAGE = 0.7
# Multiples of the evidence above this teach the last direction, up to a whole request.
TEACHES = 0.9
# Projections that differ by less are equal: in float32 equal rows may differ by a rounding.
SAME = 2e-5
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / CELLS) for i in range(CELLS)])


class Directions:
    """reference: (n, k). capacity: rows that the bag holds, at least n. margin: (k,) by how much each score may move
    unseen, 0 by default: of a row that is ranked, the most that this allows along a direction is taken off."""

    def __init__(self, reference: NDArray[np.float32], capacity: int, margin: ArrayLike | None = None) -> None:
        n, k = reference.shape
        self._margin = np.zeros(k, np.float32) if margin is None else np.array(margin, np.float32)
        self._bag = np.empty((capacity + 1, k), np.float32)
        self._bag[:n] = reference
        self._size = n
        self._reference = reference.copy()  # not a view that keeps a larger array
        self._learned = np.zeros((len(HALF_LIVES), k))
        self._squares = np.zeros((len(HALF_LIVES), 1))
        self._point()

    def rank(self, scores: NDArray[np.float32], rng: np.random.Generator) -> Floats:
        """(directions,) smoothed conformal p-values along each in the bag, which takes the row in."""
        m = self._size
        self._bag[m] = scores
        along = self._towards @ self._bag[: m + 1].T
        own = along[:, m:] - (np.abs(self._towards) @ self._margin)[:, None]
        less = np.array([np.count_nonzero(row) for row in along < own - SAME])
        upto = np.array([np.count_nonzero(row) for row in along <= own + SAME])
        p = (less + rng.random(len(less)) * (upto - less)) / (m + 1)
        if m < len(self._bag) - 1:
            self._size += 1
        else:
            # At random among all m + 1, the new one included, as in the scores' bags.
            self._bag[rng.integers(m + 1)] = scores
        return p

    def reference_ranks(self, scores: NDArray[np.float32]) -> Floats:
        """(directions,) where the row lies along each in the reference alone, ties in their middle."""
        along = self._towards @ np.concatenate((self._reference, scores[None])).T
        own = along[:, -1:]
        return ((along < own - SAME).mean(axis=1) + (along <= own + SAME).mean(axis=1)) / 2

    def teach(self, p: Floats, multiple: float) -> None:
        """Learn from a request's p-values, (k,), which multiplied the evidence by `multiple`."""
        weight = np.ones((len(HALF_LIVES), 1))
        weight[-1] = min(max(1 - TEACHES / multiple, 0), 1) if multiple > 0 else 0
        fades = _FADES**weight
        self._learned *= fades
        self._learned += weight * _NORMAL[cells(p)]
        self._squares *= fades * fades
        self._squares += weight * weight
        self._point()

    def _point(self) -> None:
        """The directions to rank along: of unit length, without what is noise."""
        size = np.abs(self._learned)
        kept = np.maximum(size - SHRINKAGE * np.sqrt(self._squares), 0)
        kept = np.where(kept.any(axis=1, keepdims=True), np.copysign(kept, self._learned), self._learned)
        length = np.sqrt(np.add.reduce(kept * kept, axis=1, keepdims=True))
        self._towards = (kept / np.maximum(length, 1e-12)).astype(np.float32)

    def state(self) -> State:
        return {
            "bag": self._bag[: self._size].copy(),
            "reference": self._reference.copy(),
            "learned": self._learned.copy(),
            "squares": self._squares.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray], capacity: int, margin: ArrayLike | None = None) -> Self:
        """Earlier releases taught with half of the requests; their bag goes on, and directions are learned anew."""
        self = cls(state["bag"], capacity, margin)
        if "learned" in state:
            self._reference = np.array(state["reference"])
            self._learned, self._squares = np.array(state["learned"]), np.array(state["squares"])
            self._point()
        return self
