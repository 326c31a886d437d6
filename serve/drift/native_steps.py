"""A detector's step for several requests in one call of detector.cpp, over the arrays of its parts."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from serve.drift.bets import Bank
from serve.drift.directions import Directions
from serve.drift.mean_rows import MeanRows
from serve.drift.native import DetectorView, Native, at, lots_at
from serve.drift.score_bags import ScoreBags


class NativeSteps:
    """Over a detector's parts: their arrays stay where they are, what else they hold is given and taken back."""

    def __init__(
        self,
        native: Native,
        lots: np.random.Generator,
        margin: NDArray[np.float32],
        bags: ScoreBags,
        bank: Bank,
        directions: Directions | None,
    ) -> None:
        self._native, self._margin, self._lots = native, margin, lots
        self._parts = (bags, bank) if directions is None else (bags, bank, directions)
        self._view = DetectorView(lots=lots_at(lots), margin=at(margin) if margin.any() else None)
        self._address = ctypes.addressof(self._view)
        for part in self._parts:
            part.show(self._view)

    def __call__(
        self,
        scores: NDArray[np.float32],
        means: MeanRows | None,
        mean_rows: NDArray[np.float32] | None,
        updates: int,
        stop: float,
    ) -> NDArray[np.float64]:
        """Take rows of scores (n, columns) until the evidence reaches `stop`: what it was after each that was taken.

        mean_rows: (n, width), if `means` ranks them. updates: of the detector before.
        """
        view, evidence = self._view, np.empty(len(scores))
        view.updates = updates
        for part in self._parts:
            part.give(view)
        view.means_off, view.means_evidence = (True, 0.0) if means is None else (means.off, means.evidence())
        ranked = means.shown() if means is not None and mean_rows is not None else None
        view.means = None if ranked is None else ctypes.addressof(ranked)
        at_means, width = (None, 0) if mean_rows is None else (at(mean_rows), mean_rows.shape[1])
        taken = self._native.steps(self._address, at(scores), at_means, width, len(scores), stop, at(evidence))
        for part in self._parts:
            part.take_back(view)
        if means is not None and ranked is not None:
            means.take_back()
        return evidence[:taken]
