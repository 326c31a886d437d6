"""A detector's step for several requests in one call of detector.cpp, over the arrays of its parts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.drift.detector.bets import Bank
from serve.drift.detector.directions import Directions
from serve.drift.detector.effect_size import EffectSize
from serve.drift.detector.mean_rows import MeanRows, Phase
from serve.drift.detector.score_bags import ScoreBags
from serve.drift.native import DetectorView, MeanRowsView, Native, at, lots_at


class Stage(NamedTuple):
    """Where a detector is. updates: of it before; sized: each request is shown to the effect; drifted: there is nothing
    to stop at any more. sized_from, threshold: evidence to stop at."""

    updates: int
    sized: bool
    drifted: bool
    sized_from: float
    threshold: float
    tolerated: float


class NativeSteps:
    """Over a detector's parts: their arrays stay where they are, what else they hold is given and taken back.

    reference: (scores, n) of it alone, sorted. margin: none where there are no margins.
    """

    def __init__(
        self,
        native: Native,
        lots: np.random.Generator,
        margin: NDArray[np.float32],
        reference: NDArray[np.float32],
        bags: ScoreBags,
        bank: Bank,
        directions: Directions | None,
        effect: EffectSize,
    ) -> None:
        self._native = native
        self._lots = lots
        self._arrays = (margin, reference)
        self._parts = (bags, bank) if directions is None else (bags, bank, directions)
        self._effect, self._effect_view = effect, effect.shown()
        self._view = DetectorView(
            lots=lots_at(lots), margin=at(margin) if margin.any() else None, reference=at(reference),
            known=reference.shape[1], effect=ctypes.addressof(self._effect_view),
        )  # fmt: skip
        self._address = ctypes.addressof(self._view)
        # Those that were ranked last.
        self._means: MeanRows | None = None
        self._means_view = MeanRowsView()
        for part in self._parts:
            part.show(self._view)

    def __call__(
        self,
        scores: NDArray[np.float32],
        means: MeanRows | None,
        mean_rows: NDArray[np.float32] | None,
        stage: Stage,
    ) -> NDArray[np.float64]:
        """Take rows of scores (n, columns) until the evidence is first to be sized, or that of a drift: what it was
        after each that was taken.

        mean_rows: (n, width), if `means` ranks them.
        """
        view, evidence = self._view, np.empty(len(scores))
        view.updates = stage.updates
        view.sized = stage.sized
        view.drifted = stage.drifted
        view.sized_from, view.threshold = stage.sized_from, stage.threshold
        view.means_off, view.means_evidence = (True, 0.0) if means is None else (means.off, means.evidence())
        self._effect.give(self._effect_view, stage.tolerated)
        at_means, width = self._give(means, mean_rows)
        taken = self._native.steps(self._address, at(scores), at_means, width, len(scores), at(evidence))
        self._take_back(means)
        self._effect.take_back(self._effect_view)
        return evidence[:taken]

    def places(
        self,
        scores: NDArray[np.float32],
        means: MeanRows | None,
        mean_rows: Sequence[NDArray[np.float32] | None],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n, streams) each: how many of the reference alone lie below each row, and how many not above it."""
        less, upto = np.empty((2, len(scores), self._effect_view.streams), np.int64)
        known, together = np.array([row is not None for row in mean_rows]), None
        if means is not None and means.phase is Phase.RANKING and known.any():
            nothing = next(np.zeros_like(row) for row in mean_rows if row is not None)
            together = means.together([nothing if row is None else row for row in mean_rows])
        at_means, width = self._give(means, together)
        self._native.places(self._address, at(scores), at_means, width, at(known), len(scores), at(less), at(upto))
        self._take_back(means)
        return less, upto

    def _give(self, means: MeanRows | None, mean_rows: NDArray[np.float32] | None) -> tuple[int | None, int]:
        """What all parts hold besides arrays; where the mean rows lie, and their width."""
        for part in self._parts:
            part.give(self._view)
        self._view.means = None
        if means is None or mean_rows is None:
            return None, 0
        if means is not self._means:
            self._means, self._means_view = means, means.shown()
        means.give(self._means_view)
        self._view.means = ctypes.addressof(self._means_view)
        return at(mean_rows), mean_rows.shape[1]

    def _take_back(self, means: MeanRows | None) -> None:
        for part in self._parts:
            part.take_back(self._view)
        if means is not None and self._view.means:
            means.take_back(self._means_view)
