"""Bets on streams of p-values, and their evidence.

While nothing changes a p-value is uniform on [0, 1), and a bet on it multiplies by e with E[e] = 1. Each stream carries

- eight fixed bets, which need not learn: likelihood ratios of a normal score that moved by `shift` standard deviations
  in a share of the requests, up or (scores only) down;
- scores only: three histograms of its p-values so far, which find any other distribution once they have learned it.

Shiryaev-Roberts: R <- (R + 1) e. R - t is a martingale, so the mean time until R >= c is at least c, and also for a
weighted mean of many R (Shin, Ramdas and Rinaldo, E-detectors, 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.native import DetectorView, at, native

Floats: TypeAlias = NDArray[np.floating]
State: TypeAlias = dict[str, NDArray]

# Bins and half-life (in requests) of the histograms that bet.
# Many bins: few foreign requests among many lie at the very ends of the ranks.
BETS = ((30, 100.0), (15, 500.0), (15, 2000.0))
_BINS = np.array([bins for bins, _ in BETS])
_FADES = np.array([0.5 ** (1 / half_life) for _, half_life in BETS])
# A histogram begins as this many requests spread evenly, and this much of each bet stays uniform.
PRIOR = 10.0
UNIFORM = 0.1
# The fixed bets: a shift in standard deviations, and the share of the requests that have it.
SHIFTS = ((0.8, 1.0), (3.0, 0.9), (3.0, 0.2), (3.5, 0.08))  # of a score, each up and down
ALONG = ((0.4, 1.0), (0.8, 1.0), (1.5, 0.9), (3.0, 0.9), (2.0, 0.25), (3.5, 0.25), (2.5, 0.1), (3.5, 0.1))
# Along directions of many numbers, which are learned slowly; and the share of the bag that has the shift by then. In
# such a bag foreign requests lie less far up, so that bets as if there were none lose what was won before.
ALONG_MANY = ((2.0, 0.2, 0.0), (3.0, 0.2, 0.0), (1.2, 0.24, 0.08), (2.0, 0.2, 0.07), (3.0, 0.15, 0.05))
FIXED = 8
# What the histograms weigh among the bets of a score.
LEARNED_WEIGHT = 0.3
# A fixed bet is constant over so many equal parts of [0, 1).
CELLS = 1024
# R ends here: far above any threshold, and a bet on it overflows nothing.
MOST = 1e290
# Below it the histograms are written anew with a unit of 1.
SMALLEST_UNIT = 1e-100


def cells(p: Floats) -> NDArray[np.intp]:
    """Which of the CELLS parts of [0, 1) each p-value lies in."""
    return np.minimum((p * CELLS).astype(np.intp), CELLS - 1)


def _shifted(shift: float, share: float, in_bag: float = 0.0) -> Floats:
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


_UP = np.array([_shifted(shift, share) for shift, share in SHIFTS])
_SCORE_BETS = np.ascontiguousarray(np.concatenate((_UP, _UP[:, ::-1])).T)  # (CELLS, FIXED)
_DIRECTION_BETS = np.ascontiguousarray(np.array([_shifted(shift, share) for shift, share in ALONG]).T)
MANY_BETS = np.ascontiguousarray(np.array([_shifted(*bet) for bet in ALONG_MANY]).T)


class Bank:
    """Streams of p-values with their bets: first the scores', then those of the directions, which move up only.

    weights: (scores,) what each score weighs among them. Half of all weight is the directions', if there are any.
    bounded: (scores,) of which of them only bounds of the p-values are known. Their histograms do not bet: only what
    grows with p may bet on a lower bound, and what falls on an upper one.
    """

    def __init__(self, weights: ArrayLike, directions: int, bounded: ArrayLike | None = None) -> None:
        share = np.asarray(weights, np.float64)
        share = share / share.sum()
        k, n = len(share), len(share) + directions
        if directions:
            share = np.concatenate((share, np.full(directions, 1 / directions))) / 2
        self._scores = k
        self._directions = directions
        self._stream_share = share
        # Flat arrays: the histograms score by score, then the fixed bets stream by stream.
        self._bins, self._fades = np.tile(_BINS, k), np.tile(_FADES, k)
        self._first_bin, self._last_bin = np.cumsum(self._bins) - self._bins, self._bins - 1
        is_bounded = np.zeros(k, np.bool_) if bounded is None else np.asarray(bounded, np.bool_)
        by_histograms = np.zeros(n)
        by_histograms[:k] = np.where(is_bounded, 0, LEARNED_WEIGHT)
        self._share = np.concatenate(
            (
                np.repeat((share * by_histograms)[:k] / len(BETS), len(BETS)),
                np.repeat(share * (1 - by_histograms) / FIXED, FIXED),
            )
        )
        self._idle = np.flatnonzero(is_bounded.repeat(len(BETS)))
        learned = k * len(BETS)
        # R of each bet; and Page's statistic, which falls to 1 before a change and tells when it did last.
        bets = len(self._share)
        self._both = np.array([np.zeros(bets), np.ones(bets)])
        self._r, self._page = self._both
        self._start = np.zeros(bets, np.int64)
        self._evidence = 0.0
        # The histograms without the prior. To fade them would touch every bin at every request; instead each request
        # weighs more than the one before: `_unit` is what 1 is now.
        self._learned = np.zeros(self._bins.sum())
        self._unit = np.ones(learned)
        self._weight = np.zeros(learned)

    def observe(self, p: Floats, now: int, bounds: tuple[Floats, Floats] | None = None) -> float:
        """Bet on `p`, (streams,), then learn it; by how much it multiplied the evidence.

        bounds: the least and the most that the scores' p-values may be, (scores,) each.
        """
        places, k = cells(p), self._scores
        several = None if bounds is None else (bounds[0][None], bounds[1][None])
        (bets,) = self.prepare(p[None, :k], places[None, :k], several)
        return self.place(bets, now, places[k:])

    def prepare(
        self, p: Floats, places: NDArray[np.intp], bounds: tuple[Floats, Floats] | None = None
    ) -> NDArray[np.float64]:
        """(n, bets) for `place`: what is bet on the scores of n requests, one after another, once they are learned.

        p, places: (n, scores) p-values and their `cells`; bounds: as in `observe`, of each.
        """
        k, learned = self._scores, len(self._unit)
        bets = np.empty((len(p), len(self._r)))
        fixed = bets[:, learned : learned + k * FIXED].reshape(-1, k, FIXED)
        self._bet_learned(p, bets[:, :learned])
        if bounds is None:
            # Here and below: to take is faster than to index, and to clip than to check.
            fixed[:] = _SCORE_BETS.take(places, axis=0, mode="clip")
        else:
            fixed[..., : len(_UP)] = _SCORE_BETS[cells(bounds[0]), : len(_UP)]
            fixed[..., len(_UP) :] = _SCORE_BETS[cells(bounds[1]), len(_UP) :]
        return bets

    def place(self, bets: NDArray[np.float64], now: int, directions: ArrayLike) -> float:
        """Place what was prepared for a request, and the bets on the `cells` of its directions; by how much that
        multiplied the evidence."""
        before = self._evidence
        if self._directions:
            rows = _DIRECTION_BETS.take(directions, axis=0, mode="clip")
            bets[-self._directions * FIXED :] = rows.reshape(-1)
        self._r += 1
        np.maximum(self._page, 1, out=self._page)
        self._both *= bets
        np.minimum(self._both, MOST, out=self._both)
        np.putmask(self._start, self._page <= 1, now)
        self._evidence = self._weighed()
        return self._evidence / (before + 1)

    def _bet_learned(self, p: Floats, e: NDArray[np.float64]) -> None:
        """What the histograms bet on the scores' p-values of some requests, into `e`, (n, bets); each learns those
        before."""
        n, steps = len(p), np.empty((len(p) + 1, len(self._unit)))
        steps[0], steps[1:] = self._unit, self._fades
        units = np.multiply.accumulate(steps)
        if n > 1 and units[-1, 0] < SMALLEST_UNIT:  # which fades fastest: written anew in between
            for number in range(n):
                self._bet_learned(p[number : number + 1], e[number : number + 1])
            return
        bins = (p.repeat(len(BETS), axis=1) * self._bins).astype(np.intp)
        np.minimum(bins, self._last_bin, out=bins)
        bins += self._first_bin
        weights = steps
        counts = self._learned
        one = 1 / units[1:]
        weights[0] = self._weight
        for number in range(n):
            held = counts.take(bins[number], out=e[number], mode="clip")
            counts[bins[number]] = held + one[number]
            np.multiply(weights[number], self._fades, out=weights[number + 1])
            weights[number + 1] += 1
        # Towards the prior, which never fades: a bin that is never hit keeps a density.
        e *= self._bins
        e *= units[:-1]
        e += PRIOR
        e /= weights[:-1] + PRIOR
        e *= 1 - UNIFORM
        e += UNIFORM
        if len(self._idle):
            e[:, self._idle] = 1
        self._unit[:], self._weight[:] = units[-1], weights[-1]
        if units[-1, 0] < SMALLEST_UNIT:
            self._learned *= self._unit.repeat(self._bins)
            self._unit[:] = 1

    def show(self, view: DetectorView) -> None:
        """Where all of it lies, for `serve.drift.native`."""
        for name, array in (("share", self._share), ("r", self._r), ("page", self._page), ("start", self._start)):
            setattr(view, name, at(array))
        for name, array in (("learned", self._learned), ("unit", self._unit), ("weight", self._weight)):
            setattr(view, name, at(array))
        view.fades, view.bins = at(self._fades), at(self._bins)
        view.score_bets, view.direction_bets = at(_SCORE_BETS), at(_DIRECTION_BETS)

    def give(self, view: DetectorView) -> None:
        """What a call needs besides the arrays."""
        view.evidence = self._evidence

    def take_back(self, view: DetectorView) -> None:
        """What a call changed besides the arrays."""
        self._evidence = view.evidence

    def evidence(self) -> float:
        """The weighted mean of all R."""
        return self._evidence

    def _weighed(self) -> float:
        """That, worked out: always in the same order, so that what goes on from a state has the same."""
        code = native()
        if code is None:
            return float(self._r @ self._share)
        evidence: float = code.evidence(at(self._r), at(self._share), len(self._r))
        return evidence

    def log_means(self) -> Floats:
        """(scores,): ln of the weighted mean over the bets of each."""
        means = (self._by_stream(self._r * self._share) / self._stream_share)[: self._scores]
        return np.log(means, out=np.full(means.shape, -np.inf), where=means > 0)

    def weights(self) -> Floats:
        """(streams,) with the sum 1: half by the evidence of each stream, half as from the beginning."""
        total = self._by_stream(self._r * self._share)
        return (total / max(total.sum(), 1e-300) + self._stream_share) / 2

    def _by_stream(self, values: Floats) -> Floats:
        """(streams,): the sum over the bets of each."""
        learned = len(self._unit)
        total = values[learned:].reshape(-1, FIXED).sum(axis=1)
        total[: self._scores] += values[:learned].reshape(-1, len(BETS)).sum(axis=1)
        return total

    def began(self) -> tuple[float, int]:
        """Page's statistic of the strongest bet, and the update after which its run began."""
        strongest = self._page.argmax()
        return float(self._page[strongest]), int(self._start[strongest])

    def reset(self, now: int) -> None:
        """Begin again at no evidence; what the histograms learned stays."""
        self._r[:] = 0
        self._evidence = 0.0
        self._page[:] = 1
        self._start[:] = now

    def state(self) -> State:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where this `state()` was. Earlier releases had histograms of the directions too, which are left out.
        Still earlier ones had no fixed bets: those begin empty, and the evidence stays what it was."""
        learned, saved = len(self._unit), len(state["unit"])
        for name in ("unit", "weight", "learned"):
            kept = getattr(self, f"_{name}")
            kept[:] = state[name][: len(kept)]
        for name in ("r", "page", "start"):
            kept, values = getattr(self, f"_{name}"), state[name]
            kept[:learned] = values[:learned]
            if len(values) > saved:
                kept[learned:] = values[saved:]
        self._evidence = self._weighed()
        if len(state["r"]) > saved:
            return
        # There half of the weight was the directions', and within a half all bets weighed the same.
        old, scores = state["r"], self._scores * len(BETS)
        directions = old[scores:]
        was = (old[:scores].mean() + directions.mean()) / 2 if len(directions) else old.mean()
        now = self.evidence()
        if now > 0:
            self._r *= was / now
            self._evidence = self._weighed()


_KEPT = ("r", "page", "start", "learned", "unit", "weight")
