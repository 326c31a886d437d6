"""Has what arrives changed? A conformal e-detector: `update(row)` after each request, then `drifted`.

    detector = Drift(reference, threshold=1e5, seed=7)   # reference: one row of scores a request, (n, k)
    detector.update(row)                                 # k scores of one request, in any units
    detector.drifted, detector.log_evidence              # evidence >= threshold at some time since `reset()`

What is promised: while requests are exchangeable with the reference (independent draws of one source are), the mean
number of requests until a false alarm is at least `threshold`, however small the reference and whatever the scores:
heavy tails, ties and constants too. Three steps lead there.

1. A score is ranked in a bag of the reference and what came since: the smoothed conformal p-value (Vovk et al.,
   Algorithmic Learning in a Random World, 2022), independent and uniform while nothing changes. A full bag forgets one
   entry drawn by lot from all, the new one included: what remains tells nothing about the ranks that were given, so
   they stay independent.
2. Fixed bets are placed on the p-value (`detector.bets`); a bet multiplies by e, E[e] = 1.
3. Shiryaev-Roberts: R <- (R + 1) e. R - t is a martingale, so the mean time until R >= c is at least c (Shin, Ramdas
   and Rinaldo, E-detectors, 2022). The evidence is a mean of R over bets and scores, by `weights`.

Where there are mean rows, directions in which those move have half of the evidence (`serve.drift.detector.mean_rows`).

The promise is a theorem for one score. The mean over scores is exact as far as their p-values share one history; ranks
of different scores in one bag can tell of one another in theory. `make drift-proof` measures what that amounts to.

Neither clock nor files: arrays in, arrays out. The state is a dictionary of numpy arrays, and a detector restored from
it goes on bit for bit. Memory is bounded by `capacity`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.detector.bets import Bank, Floats, State
from serve.drift.detector.effect_size import RECENT, foreign_share, rank_shift
from serve.drift.detector.mean_rows import HALF_LIVES as MEAN_HALF_LIVES
from serve.drift.detector.mean_rows import MeanRows, Phase
from serve.drift.detector.recent_rows import all_finite, latest
from serve.drift.detector.score_bags import ScoreBags
from serve.drift.state_arrays import below, own, prefixed
from serve.sequential.random_state import rng_from, rng_state

# An evidence of so many thresholds is sure: its size is seen on requests that raised the evidence, so that an evidence
# by chance is likely to come with one.
SURE = 20.0
# Requests that are recent, before any drift.
FEW = 64


class Drift:
    """One detector over rows of k scores. Not thread-safe.

    reference: (n, k), n >= 1; only its ranks matter. threshold: c, the mean number of requests between false alarms.
    capacity: rows that the bag holds, by default as many as the reference and at least 1,000; never fewer than the
    reference. weights: (k,) what each score weighs in the evidence, by default the same. margin: by how much
    each may move unseen, in its unit; 0 by default. means: what bets on the requests' mean rows. seed: of the random
    numbers that break ties and choose what leaves the bag.
    """

    def __init__(
        self,
        reference: ArrayLike,
        *,
        threshold: float = 1e5,
        capacity: int | None = None,
        weights: ArrayLike | None = None,
        margin: ArrayLike | None = None,
        means: MeanRows | None = None,
        seed: int = 0,
    ) -> None:
        rows = np.asarray(reference, np.float32)
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(
                f"the reference has the shape {rows.shape}; it is (requests, scores), at least one of each"
            )
        if not np.isfinite(rows).all():
            raise ValueError("the reference holds a score that is not a finite number; leave such requests out")
        if not threshold > 1:
            raise ValueError(
                f"threshold {threshold} is below any evidence; it is the mean number of requests between alarms"
            )
        n, k = rows.shape
        self.threshold = float(threshold)
        self.capacity = max(n, 1000 if capacity is None else capacity)
        self.updates = 0
        self.crossed_at: int | None = None
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._reference = np.ascontiguousarray(np.sort(rows, axis=0).T)  # (k, n)
        self._margin = np.zeros(k, np.float32) if margin is None else np.array(margin, np.float32)
        self._bags = ScoreBags(self._reference, self.capacity, self._margin)
        self._weights = np.ones(k) if weights is None else np.array(weights, np.float64)
        self._bank = Bank(self._weights)
        self.means = means
        self.sure = False  # the evidence has reached SURE thresholds since `reset`: what an alarm takes
        self._moved = np.full(k, -np.inf)
        self._ranks: deque[NDArray[np.float32]] = deque(maxlen=RECENT)

    def watch_means(self, means: MeanRows | None) -> None:
        """Rows go to these mean rows from now on."""
        self.means = means

    def update(self, row: ArrayLike, mean_row: NDArray[np.float32] | None = None) -> bool:
        """Take the scores of one request, and say whether the evidence has reached the threshold."""
        (drifted,) = self.steps(np.asarray(row, np.float32)[None], [mean_row])
        return drifted

    def steps(self, rows: ArrayLike, mean_rows: Sequence[NDArray[np.float32] | None]) -> Iterator[bool]:
        """`update` with each of several rows, to be run to its end. What one request does not change for the next is
        worked out for all of them at once; the numbers are those of one after another, to the bit."""
        scores = np.array(rows, np.float32, order="C")
        if scores.shape[1:] != self._weights.shape:
            raise ValueError(
                f"a row has the shape {scores.shape[1:]}; "
                f"this detector's reference has {len(self._weights)} scores a row"
            )
        if len(mean_rows) != len(scores):
            raise ValueError(f"{len(scores)} rows come with {len(mean_rows)} mean rows")
        if not all_finite(scores):
            raise ValueError("a score is not a finite number; leave the request out")
        return self._steps(scores, mean_rows)

    def _steps(self, scores: NDArray[np.float32], mean_rows: Sequence[NDArray[np.float32] | None]) -> Iterator[bool]:
        k, nows = len(self._weights), range(self.updates + 1, self.updates + 1 + len(scores))
        lots = [self._bags.lots(self._rng, ahead) for ahead in range(len(scores))]
        placed = self._bank.steps(self._bank.prepare(*self._bags.rank(scores, lots)), nows)
        seen = [(row, now) for row, now in zip(mean_rows, nows, strict=True) if row is not None]
        if self.means is not None and seen:
            means = self.means.steps(np.array([row for row, _ in seen]), [now for _, now in seen])
        ranks = np.full((len(scores), k + len(MEAN_HALF_LIVES)), 0.5, np.float32)
        for i, (known, column) in enumerate(zip(self._reference, np.ascontiguousarray(scores.T), strict=True)):
            ranks[:, i] = (known.searchsorted(column) + known.searchsorted(column, "right")) / (2 * known.size)
        for rank, mean_row in zip(ranks, mean_rows, strict=True):
            next(placed)
            if self.means is not None and mean_row is not None:
                rank[k:] = next(means)
            self.updates += 1
            self._ranks.append(rank)
            self._weigh(self._evidence())
            yield self.drifted

    @property
    def drifted(self) -> bool:
        """Whether the evidence has reached the threshold since the last `reset`."""
        return self.crossed_at is not None

    @property
    def log_evidence(self) -> float:
        """ln of the weighted mean of all R: the last step's; it may fall again when the bag has learned the new."""
        evidence = self._evidence()
        return math.log(evidence) if evidence > 0 else -math.inf

    @property
    def evidence_by_score(self) -> Floats:
        """(k,): ln of the mean R of each score alone, to say what moved; after a crossing, as it was then."""
        return self._moved if self.drifted else self._bank.log_means()

    @property
    def changed_at(self) -> int:
        """The update after which the change began, as the strongest bet sees it."""
        runs = [self._bank.began()]
        if self.means is not None:
            runs.append(self.means.began())
        return max(runs)[1]

    @property
    def foreign_share(self) -> float | None:
        """At least this share of the requests since the change does not fit the reference; None before there is one."""
        return foreign_share(self._since_change(), self._reference.shape[1]) if self.drifted else None

    @property
    def rank_shift(self) -> Floats:
        """(k,) in [-0.5, 0.5]: mean rank of recent requests in the reference, less a half, less its standard error.

        0.5 says that all lie above the whole reference. A share q of foreign requests shifts it by at most q / 2.
        """
        return self._rank_shift(0.0)

    @property
    def sure_rank_shift(self) -> Floats:
        """(k,): less two standard errors of the reference too."""
        return self._rank_shift(2 * self._reference.shape[1] ** -0.5)

    def _rank_shift(self, error: float) -> Floats:
        ranks = self._since_change()[:, : len(self._weights)]
        return rank_shift(ranks, math.hypot(error, max(len(ranks), 1) ** -0.5))

    def _since_change(self) -> NDArray[np.float32]:
        """(n, scores and directions): ranks of the requests since the change began, RECENT at most; FEW before any."""
        count = max(self.updates - self.changed_at, 1) if self.drifted else FEW
        return latest(self._ranks, len(self._weights) + len(MEAN_HALF_LIVES), count)

    def reset(self, *, effects: bool = False) -> None:
        """Begin again at no evidence, after an alarm has been dealt with; what the bag holds stays.

        effects: also forget where recent requests lie in the reference.
        """
        self.crossed_at = None
        self.sure = False
        self._bank.reset(self.updates)
        if self.means is not None:
            self.means.reset(self.updates)
        if effects:
            self._ranks.clear()

    def state(self) -> State:
        """All of it, as arrays for `numpy.savez`: no objects, nothing to unpickle."""
        state = {
            "reference": self._reference.T.copy(),
            "bags": self._bags.sorted(),
            "threshold": np.float64(self.threshold),
            "counts": np.array([self.capacity, self.updates, -1 if self.crossed_at is None else self.crossed_at]),
            "lots": rng_state(self._rng),
            "moved": self._moved.copy(),
            "weights": self._weights.copy(),
            "margin": self._margin.copy(),
            "ranks": latest(self._ranks, len(self._weights) + len(MEAN_HALF_LIVES)),
            "stages": np.array([self.sure]),
        }
        state |= prefixed(self._bank.state(), "bank.")
        if self.means is not None:
            state |= prefixed(self.means.state(), "means.")
        return {name: np.asarray(value) for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Self:
        """The detector whose `state()` this was; it goes on bit for bit."""
        self = cls.__new__(cls)
        self.threshold = float(state["threshold"])
        capacity, updates, crossed_at = (int(count) for count in state["counts"])
        self.capacity, self.updates = capacity, updates
        self.crossed_at = None if crossed_at < 0 else crossed_at
        self._rng = rng_from(state["lots"])
        k, n = len(state["bags"]), len(state["reference"])
        self._reference = own((k, n), state["reference"].T, np.float32)
        self._margin = own(k, state["margin"], np.float32)
        self._bags = ScoreBags(state["bags"], capacity, self._margin)
        self._weights = own(k, state["weights"])
        self._bank = Bank(self._weights)
        self._bank.restore(below(state, "bank."))
        means = below(state, "means.")
        self.means = MeanRows.from_state(means) if means else None
        self.sure = bool(state["stages"][-1])
        self._moved = own(k, state["moved"])
        self._ranks = deque(np.array(state.get("ranks", ())), maxlen=RECENT)  # the last release kept none
        return self

    def _evidence(self) -> float:
        """The weighted mean of all R."""
        if self.means is None or self.means.phase is Phase.OFF:
            return self._bank.evidence()
        return (self._bank.evidence() + self.means.evidence()) / 2

    def _weigh(self, evidence: float) -> None:
        """What follows from the evidence after a request."""
        if not self.drifted and evidence >= self.threshold:
            self.crossed_at = self.updates
            self._moved = self._bank.log_means()
        self.sure |= evidence >= SURE * self.threshold
