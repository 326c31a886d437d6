"""Bets on streams of p-values, and their evidence.

While nothing changes a p-value is uniform on [0, 1), and a bet on it multiplies by e with E[e] = 1. Each stream carries
eight bets, which need not learn: likelihood ratios of a normal score that moved by `shift` standard deviations in a
share of the requests, up or down.

Shiryaev-Roberts: R <- (R + 1) e. R - t is a martingale, so the mean time until R >= c is at least c, and also for a
weighted mean of many R (Shin, Ramdas and Rinaldo, E-detectors, 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.floating]
State: TypeAlias = dict[str, NDArray]

# The bets: a shift in standard deviations, the share of the requests that have it, and the share of the bag that has it
# by then. In such a bag foreign requests lie less far up, so that bets as if there were none lose what was won before.
# Of a score, each up and down.
SHIFTS = ((0.8, 1.0, 0.1), (3.0, 0.9, 0.0), (3.0, 0.2, 0.04), (3.5, 0.08, 0.01))
FIXED = 2 * len(SHIFTS)
# Along directions of many numbers, which are learned slowly.
ALONG_MANY = ((2.0, 0.2, 0.0), (3.0, 0.2, 0.0), (1.2, 0.24, 0.08), (2.0, 0.2, 0.07), (3.0, 0.15, 0.05))
# A bet is constant over so many equal parts of [0, 1).
CELLS = 1024
# R ends here: far above any threshold, and a bet on it overflows nothing.
MOST = 1e290


def cells(p: Floats) -> NDArray[np.intp]:
    """Which of the CELLS parts of [0, 1) each p-value lies in."""
    return np.minimum((p * CELLS).astype(np.intp), CELLS - 1)


def _shifted(shift: float, share: float, in_bag: float) -> Floats:
    """(CELLS,) density of the p-values, if `share` of the scores are normal with mean `shift`, and `in_bag` of those
    that they are ranked among; its mean is 1."""
    normal = NormalDist()
    edges = [_quantile(i / CELLS, shift, in_bag) for i in range(1, CELLS)]
    mixed = [(1 - share) * normal.cdf(edge) + share * normal.cdf(edge - shift) for edge in edges]
    return np.diff([0.0, *mixed, 1.0]) * CELLS


def _quantile(level: float, shift: float, share: float) -> float:
    """Of a normal score that has the mean `shift` in `share` of the cases."""
    normal = NormalDist()
    low = normal.inv_cdf(level)
    if not share:
        return low
    high = low + shift
    for _ in range(40):
        middle = (low + high) / 2
        below = (1 - share) * normal.cdf(middle) + share * normal.cdf(middle - shift) < level
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


_UP = np.array([_shifted(*bet) for bet in SHIFTS])
_SCORE_BETS = np.ascontiguousarray(np.concatenate((_UP, _UP[:, ::-1])).T)  # (CELLS, FIXED)
MANY_BETS = np.ascontiguousarray(np.array([_shifted(*bet) for bet in ALONG_MANY]).T)


class Runs:
    """R of some bets; and Page's statistic of each, which falls to 1 before a change and tells when it did last."""

    def __init__(self, bets: int) -> None:
        self._both = np.array([np.zeros(bets), np.ones(bets)])
        self._start = np.zeros(bets, np.int64)

    @property
    def r(self) -> NDArray[np.float64]:
        """(bets,)"""
        # No view that is kept: a deep copy would make it an array of its own.
        r: NDArray[np.float64] = self._both[0]
        return r

    @property
    def page(self) -> NDArray[np.float64]:
        """(bets,) Page's statistic."""
        page: NDArray[np.float64] = self._both[1]
        return page

    @property
    def start(self) -> NDArray[np.int64]:
        """(bets,): the update after which each run of it began."""
        return self._start

    def steps(
        self, bets: NDArray[np.float64], nows: Sequence[int], counts: NDArray[np.float64] | None = None
    ) -> Iterator[None]:
        """Place (n, bets) of n requests, one after another. counts: (n, bets) 0 where there is no bet on a request, 1
        for all by default."""
        path, last = np.empty((len(bets), *self._both.shape)), self._both
        for both, bet, count in zip(path, bets, repeat(1.0) if counts is None else counts, strict=False):
            np.add(last[0], count, out=both[0])
            np.maximum(last[1], 1.0, out=both[1])
            both *= bet
            last = np.minimum(both, MOST, out=both)
        quiet = np.where(path[:, 1] <= 1, np.array(nows)[:, None], -1)
        began = np.maximum.accumulate(quiet, axis=0)
        for both, start in zip(path, np.where(began < 0, self._start, began), strict=True):
            self._both[:] = both
            self._start[:] = start
            yield

    def began(self) -> tuple[float, int]:
        """Page's statistic of the strongest bet, and the update after which its run began."""
        strongest = self._both[1].argmax()
        return float(self._both[1, strongest]), int(self._start[strongest])

    def reset(self, now: int) -> None:
        """Begin again at no evidence."""
        self._both[0] = 0
        self._both[1] = 1
        self._start[:] = now

    def state(self) -> State:
        return {"r": self.r.copy(), "page": self.page.copy(), "start": self._start.copy()}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where this `state()` was."""
        for name, kept in (("r", self._both[0]), ("page", self._both[1]), ("start", self._start)):
            kept[:] = state[name].reshape(-1)


class Bank(Runs):
    """Streams of p-values with their bets. weights: (streams,) what each weighs in the evidence."""

    def __init__(self, weights: ArrayLike) -> None:
        share = np.asarray(weights, np.float64)
        self._share = np.repeat(share / share.sum() / FIXED, FIXED)
        super().__init__(len(self._share))

    @staticmethod
    def prepare(least: Floats, most: Floats) -> NDArray[np.float64]:
        """(n, bets) for `steps`: what is bet on the p-values (n, streams) of n requests, of which the least and the
        most are known. What grows with p bets on the least, and what falls on the most."""
        up, down = _SCORE_BETS.take(cells(least), axis=0), _SCORE_BETS.take(cells(most), axis=0)
        return np.concatenate((up[..., : len(_UP)], down[..., len(_UP) :]), axis=-1).reshape(len(least), -1)

    def evidence(self) -> float:
        """The weighted mean of all R."""
        return float(self.r @ self._share)

    def log_means(self) -> Floats:
        """(streams,): ln of the mean over the bets of each."""
        means = self.r.reshape(-1, FIXED).mean(axis=1)
        return np.log(means, out=np.full(means.shape, -np.inf), where=means > 0)
