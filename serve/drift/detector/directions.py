"""Directions in which live requests leave the reference, learned while they are tested.

A direction is a weighted sum of the normal scores of earlier requests' p-values: requests that lie high in a score
pull it there. Each request is first ranked along the directions in a bag of the reference and all earlier requests,
and then teaches. Those that taught are in the bag and lie a little farther along than a new one does, so that while
nothing changes a new one ranks lower than by chance, never higher. Bets that grow with the rank win less than nothing
by that; any other bet would win: histograms crossed a threshold of 100,000 after 29,000 requests on the mean. So only
rising bets are placed on directions, and `make drift-proof` measures what remains.

Three directions learn from every request and forget at different speeds. The fourth learns from a request by as much as
it raised the evidence, as in expectation maximization: with few foreign requests among many it learns from those.

Silent scores have no p-values: they are too many to rank each. They teach by their values, centred on requests that are
not in the bag. With so many scores, a request that taught lies much farther along. So as far as it pulled the
directions towards itself is taken off again (leave one out): a new one is compared with where the others lie without.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.detector.bets import CELLS, Floats, State, cells
from serve.drift.native import DetectorView, at
from serve.drift.state_arrays import own

# Half-lives: in requests, and the last in requests that raised the evidence.
HALF_LIVES = (16.0, 64.0, 256.0, 48.0)
_FADES = np.array([[0.5 ** (1 / half_life)] for half_life in HALF_LIVES])
# The same where the last direction learns nothing.
_FIRST_FADES = np.concatenate((_FADES[:-1], [[1.0]]))
# What is below so many standard errors in a direction is left out of it.
SHRINKAGE = 0.7
# Multiples of the evidence above this teach the last direction, up to a whole request.
TEACHES = 0.9
# Of a silent score no more than this teaches.
FARTHEST = 4.0
# Projections that differ by less are equal: in float32 equal rows may differ by a rounding.
SAME = 2e-5
_NONE = np.zeros(0)
# Where the ties of a row lie in each direction, and the place in the bag that it gets.
Draw: TypeAlias = tuple[list[float], int]
# Normal scores of the cells.
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / CELLS) for i in range(CELLS)])


class Directions:
    """reference: (n, k). capacity: rows that the bag holds, at least n. margin: (k,) by how much each score may move
    unseen, 0 by default: of a row that is ranked, the most that this allows along a direction is taken off. silent: so
    many of the scores, the last ones, have no p-values; they are of zero mean and unit spread. turn: after so many
    requests the directions turn to what was learned."""

    def __init__(
        self,
        reference: NDArray[np.float32],
        capacity: int,
        margin: ArrayLike | None = None,
        silent: int = 0,
        turn: int = 1,
    ) -> None:
        n, k = reference.shape
        if n > capacity or turn < 1:
            raise ValueError(f"{n} rows in a bag of {capacity}, a turn of {turn}: at least as many, and 1, are taken")
        self._margin = np.zeros(k, np.float32) if margin is None else np.array(margin, np.float32)
        self._has_margin = bool(self._margin.any())
        self._heard, self._silent = k - silent, silent
        # The most that the margins allow along each direction, (directions, 1).
        self._allowed = np.zeros((len(HALF_LIVES), 1), np.float32)
        # By scores: the requests of one lie side by side.
        self._bag = np.empty((k, capacity + 1), np.float32)
        self._bag[:, :n] = reference.T
        self._size, self._capacity = n, capacity
        self._reference = np.ascontiguousarray(reference.T)
        # Where the reference alone lies along the directions, while that is `_placed`: until they turn.
        self._known, self._placed = np.empty((len(HALF_LIVES), n), np.float32), False
        self._learned = np.zeros((len(HALF_LIVES), k))
        self._squares = np.zeros((len(HALF_LIVES), 1))
        # Where each row of the bag lies along the directions.
        self._along = np.empty((len(HALF_LIVES), capacity + 1), np.float32)
        # How far each has pulled the directions towards itself by its silent scores, and what faded since they turned.
        self._pull = np.zeros((len(HALF_LIVES), capacity + 1))
        self._faded = np.ones((len(HALF_LIVES), 1))
        self._place = self._age = 0
        self._towards = np.zeros((len(HALF_LIVES), k), np.float32)
        # Which silent scores each direction has.
        self._silent_part = np.zeros((len(HALF_LIVES), silent), np.float32)
        # What a request weighs; for the last direction it is set by the evidence.
        self._weight = np.ones((len(HALF_LIVES), 1))
        self._turn = turn
        self._point()

    def draw(self, rng: np.random.Generator, ahead: int = 0) -> Draw:
        """The random numbers of the row that comes after `ahead` others: where its ties lie, and what it replaces in a
        full bag."""
        ties, m = rng.random(len(HALF_LIVES)).tolist(), self._size + ahead
        # At random among all m + 1, the new one included, as in the scores' bags.
        return ties, m if m < self._capacity else int(rng.integers(self._capacity + 1))

    def rank(self, scores: NDArray[np.float32], rng: np.random.Generator) -> Floats:
        """(directions,) smoothed conformal p-values along each in the bag, which takes the row in."""
        return np.array(self.ranked(scores, self.draw(rng)))

    def ranked(self, scores: NDArray[np.float32], draw: Draw) -> list[float]:
        """The same, with its random numbers drawn before."""
        ties, place = draw
        m = self._size
        new = self._towards @ scores
        self._along[:, m] = new
        along, own = self._along[:, : m + 1], new[:, None]
        if self._has_margin:
            own = own - self._allowed
        less = [np.count_nonzero(row) for row in along < own - SAME]
        upto = [np.count_nonzero(row) for row in along <= own + SAME]
        if place == m and m < self._capacity:
            self._size += 1
        else:
            self._along[:, place] = new
        self._bag[:, place] = scores
        if self._silent:
            self._pull[:, place] = 0
        self._place = place
        return [(low + tie * (high - low)) / (m + 1) for low, tie, high in zip(less, ties, upto, strict=True)]

    def reference_places(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """(directions,) each: how many of the reference alone lie below the row along it, and how many not above it."""
        known, own = self._reference_along(), (self._towards @ scores)[:, None]
        return np.count_nonzero(known < own - SAME, axis=1), np.count_nonzero(known <= own + SAME, axis=1)

    def teach(self, p: Floats, multiple: float, silent: Floats = _NONE) -> None:
        """Learn from a request's p-values, (k - silent,), which multiplied the evidence by `multiple`, and from its
        silent scores."""
        self.taught(NORMAL.take(cells(p)), multiple, silent, np.minimum(np.maximum(silent, -FARTHEST), FARTHEST))

    def taught(self, heard: Floats, multiple: float, silent: Floats, taught: Floats) -> None:
        """The same, of the normal scores of its p-values, and of its silent scores as they are and as they teach."""
        weight = self._weight
        weight[-1] = share = min(max(1 - TEACHES / multiple, 0), 1) if multiple > 0 else 0
        fades = _FADES**weight if share else _FIRST_FADES
        self._learned *= fades
        if self._silent:
            self._learned[:, : self._heard] += weight * heard
            self._learned[:, self._heard :] += weight * taught
            pull = self._silent_part @ (taught * silent)
            self._pull[:, self._place] = (weight * pull[:, None] / (self._faded * fades))[:, 0]
            self._faded *= fades
        else:
            self._learned += weight * heard
        self._squares *= fades * fades
        self._squares += weight * weight
        self._age += 1
        if self._age % self._turn == 0:
            self._point()

    def _point(self) -> None:
        """The directions to rank along: of unit length, without what is noise."""
        kept = np.abs(self._learned)
        kept -= SHRINKAGE * np.sqrt(self._squares)
        np.maximum(kept, 0, out=kept)
        squares = np.add.reduce(kept * kept, axis=1, keepdims=True)
        if squares.all():
            np.copysign(kept, self._learned, out=kept)
        else:  # of a direction that is nothing but noise all is kept
            kept = np.where(kept.any(axis=1, keepdims=True), np.copysign(kept, self._learned), self._learned)
            squares = np.add.reduce(kept * kept, axis=1, keepdims=True)
        length = np.maximum(np.sqrt(squares), 1e-12)
        kept /= length
        self._turn_to(kept.astype(np.float32))
        along = self._along[:, : self._size]
        np.matmul(self._towards, self._bag[:, : self._size], out=along)
        if self._silent:
            self._pull *= self._faded
            along -= self._pull[:, : self._size] / length
            self._faded[:] = 1

    def _turn_to(self, towards: NDArray[np.float32]) -> None:
        self._towards[:], self._placed = towards, False
        if self._has_margin:
            self._allowed[:, 0] = np.abs(towards) @ self._margin
        if self._silent:
            self._silent_part[:] = towards[:, self._heard :] != 0

    def _reference_along(self) -> NDArray[np.float32]:
        """(directions, n): where the reference lies, until they turn."""
        if not self._placed:
            np.matmul(self._towards, self._reference, out=self._known)
            self._placed = True
        return self._known

    def show(self, view: DetectorView) -> None:
        """Where all of it lies, for `serve.drift.native`."""
        view.directions = len(HALF_LIVES)
        view.silent = self._silent
        view.bag_capacity = self._capacity
        view.turn = self._turn
        for name in ("bag", "along", "pull", "faded", "squares", "towards", "allowed", "silent_part"):
            setattr(view, name, at(getattr(self, f"_{name}")))
        view.taught = at(self._learned)
        view.direction_fades = at(_FADES)
        view.normal = at(NORMAL)
        view.rows = at(self._reference)
        view.reference_along = at(self._known)
        view.rows_known = self._known.shape[1]

    def give(self, view: DetectorView) -> None:
        """What a call needs besides the arrays."""
        view.size = self._size
        view.age = self._age
        view.placed = self._placed

    def take_back(self, view: DetectorView) -> None:
        """What a call changed besides the arrays."""
        self._size = view.size
        self._age = view.age
        self._placed = bool(view.placed)

    def state(self) -> State:
        return {
            "bag": self._bag[:, : self._size].T.copy(),
            "reference": self._reference.T.copy(),
            "learned": self._learned.copy(),
            "squares": self._squares.copy(),
            "towards": self._towards.copy(),
            "along": self._along[:, : self._size].copy(),
            "pull": self._pull[:, : self._size].copy(),
            "faded": self._faded.copy(),
            "age": np.array([self._age, self._turn]),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, NDArray], capacity: int, margin: ArrayLike | None = None, silent: int = 0
    ) -> Self:
        """Earlier releases taught with half of the requests; their bag goes on, and directions are learned anew. Later
        ones turned the directions with every request."""
        turn = int(state["age"][1]) if "towards" in state else 1
        self = cls(state["bag"], capacity, margin, silent, turn)
        if "learned" in state:
            self._reference = own((len(self._reference), len(state["reference"])), state["reference"].T, np.float32)
            self._known = np.empty((len(HALF_LIVES), len(state["reference"])), np.float32)
            self._learned[:], self._squares[:] = state["learned"], state["squares"]
            self._point()
        if "towards" in state:
            self._turn_to(np.array(state["towards"]))
            self._age = int(state["age"][0])
            self._along[:, : self._size], self._pull[:, : self._size] = state["along"], state["pull"]
            self._faded[:] = state["faded"]
        return self
