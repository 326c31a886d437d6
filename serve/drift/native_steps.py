"""A detector's step for several requests in one call of detector.cpp, over the arrays of its parts."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from serve.drift.bets import Bank
from serve.drift.directions import Directions
from serve.drift.mean_rows import MeanRows
from serve.drift.native import DetectorView, MeanRowsView, Native, at, lots_at
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
        view.means, at_means, width = None, None, 0
        if means is not None and mean_rows is not None:
            if means is not self._means:
                self._means, self._means_view = means, means.shown()
            means.give(self._means_view)
            view.means, at_means, width = ctypes.addressof(self._means_view), at(mean_rows), mean_rows.shape[1]
        taken = self._native.steps(self._address, at(scores), at_means, width, len(scores), stop, at(evidence))
        for part in self._parts:
            part.take_back(view)
        if means is not None and view.means:
            means.take_back(self._means_view)
        return evidence[:taken]
