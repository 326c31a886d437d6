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
2. Histograms of the p-values so far bet against the next one; a bet multiplies by e, E[e] = 1.
3. Shiryaev-Roberts: R <- (R + 1) e. R - t is a martingale, so the mean time until R >= c is at least c (Shin, Ramdas
   and Rinaldo, E-detectors, 2022). The evidence is a weighted mean of R over bets and scores.

Half of the weight lies on D, the k scores one by one, and half on F, learned directions: odd requests only teach
w = EWMA(live) - mean(bag and the one to be ranked), even ones are ranked along w among the reference and earlier even
ones. The mean in w is symmetric in all that is ranked. A mean over the reference alone would not be: its rows would
lie a little behind every new one, which with a small reference is a false alarm.

The mean over scores is exact as far as their p-values share one history; ranks of different scores in one bag can tell
of one another in theory. `make drift-proof` measures what that amounts to.

Neither clock nor files: arrays in, arrays out. The state is a dictionary of numpy arrays, and a detector restored from
it goes on bit for bit. Memory is bounded by `capacity`.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.floating]
State: TypeAlias = dict[str, NDArray]

# Bins and half-life (in requests) of the histograms that bet.
# Many bins: few foreign requests among many lie at the very ends of the ranks.
BETS = ((30, 100.0), (15, 500.0), (15, 2000.0))
_BINS = np.array([[bins] for bins, _ in BETS])
_FADES = np.array([[0.5 ** (1 / half_life)] for _, half_life in BETS])
_BINS_OF_A_STREAM = int(_BINS.sum())
_FIRST_BINS = np.cumsum(_BINS, axis=0) - _BINS
# Below it the histograms are written anew with a unit of 1.
SMALLEST_UNIT = 1e-100
# A histogram begins as this many requests spread evenly, and this much of each bet stays uniform.
PRIOR = 10.0
UNIFORM = 0.1
# Half-lives of the learned directions, in requests that teach.
DIRECTIONS = (32.0, 256.0)
# Half-life of the effect gauges, in requests.
EFFECT_HALF_LIFE = 50.0


class Drift:
    """One detector over rows of k scores. Not thread-safe; `update` costs tens of microseconds (see the README).

    reference: (n, k), n >= 1; to D only its ranks matter, F also uses distances: unit scale serves it best.
    threshold: c, the mean number of requests between false alarms. capacity: rows that the bag holds, by default as
    many as the reference and at least 1,000; never fewer than the reference. seed: of the ties' and the bag's lots.
    """

    def __init__(
        self, reference: ArrayLike, *, threshold: float = 1e5, capacity: int | None = None, seed: int = 0
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
        self._lots = np.random.Generator(np.random.PCG64(seed))
        self._reference = [array("f", column.tobytes()) for column in np.sort(rows, axis=0).T]
        self._bags = [array("f", column) for column in self._reference]
        self._scores = _Bank(k)
        self._directions = _Directions(rows, self.capacity) if k > 1 else None
        self._moved = np.full(k, -np.inf)
        self._shift = np.zeros(k)
        self._seen = np.zeros(2)  # weight of the gauges, and of its squares

    def update(self, row: ArrayLike) -> bool:
        """Take the scores of one request, and say whether the evidence has reached the threshold."""
        scores = np.asarray(row, np.float32)
        if scores.shape != (len(self._bags),):
            raise ValueError(
                f"a row has the shape {scores.shape}; this detector's reference has {len(self._bags)} scores a row"
            )
        if not np.isfinite(scores).all():
            raise ValueError("a score is not a finite number; leave the request out")
        self.updates += 1
        self._gauge(scores)
        self._scores.observe(self._rank(scores), self.updates)
        if self._directions is not None:
            self._directions.observe(scores, self.updates, self._lots)
        if self.crossed_at is None and self.log_evidence >= self.log_threshold:
            self.crossed_at = self.updates
            self._moved = self._scores.log_means()
        return self.drifted

    @property
    def drifted(self) -> bool:
        """Whether the evidence has reached the threshold since the last `reset`."""
        return self.crossed_at is not None

    @property
    def log_threshold(self) -> float:
        return math.log(self.threshold)

    @property
    def log_evidence(self) -> float:
        """ln of the weighted mean of all R: the last step's; it may fall again when the bag has learned the new."""
        ours = self._scores.log_mean()
        if self._directions is None:
            return ours
        return float(np.logaddexp(ours, self._directions.bank.log_mean()) - math.log(2))

    @property
    def evidence_by_score(self) -> Floats:
        """(k,): ln of the mean R of each score alone, to say what moved; after a crossing, as it was then."""
        return self._moved if self.drifted else self._scores.log_means()

    @property
    def changed_at(self) -> int:
        """The update after which the change began, as the strongest bet sees it."""
        banks = [self._scores] + ([self._directions.bank] if self._directions is not None else [])
        return max(banks, key=lambda bank: bank.log_r.max()).began()

    @property
    def rank_shift(self) -> Floats:
        """(k,) in [-0.5, 0.5]: mean rank of recent requests in the reference, less a half, less its standard error.

        0.5 says that all lie above the whole reference. A share q of foreign requests shifts it by at most q / 2.
        """
        if self._seen[0] == 0:
            return np.zeros(len(self._bags))
        mean = self._shift / self._seen[0]
        return np.sign(mean) * np.maximum(np.abs(mean) - self.gauge_error / math.sqrt(12), 0)

    @property
    def gauge_error(self) -> float:
        """Standard error of a mean over recent requests, of something with a standard deviation of 1."""
        weight, squares = self._seen
        return math.sqrt(squares) / float(weight) if weight else math.inf

    def reset(self) -> None:
        """Begin again at no evidence, after an alarm has been dealt with; what the bag and the bets learned stays."""
        self.crossed_at = None
        self._scores.reset(self.updates)
        if self._directions is not None:
            self._directions.bank.reset(self.updates)

    def state(self) -> State:
        """All of it, as arrays for `numpy.savez`: no objects, nothing to unpickle."""
        state = {
            "reference": np.array([np.frombuffer(column, np.float32) for column in self._reference]),
            "bags": np.array([np.frombuffer(bag, np.float32) for bag in self._bags]),
            "threshold": np.float64(self.threshold),
            "counts": np.array([self.capacity, self.updates, -1 if self.crossed_at is None else self.crossed_at]),
            "lots": lots_state(self._lots),
            "moved": self._moved.copy(),
            "shift": self._shift.copy(),
            "seen": self._seen.copy(),
        }
        state |= {f"scores.{name}": value for name, value in self._scores.state().items()}
        if self._directions is not None:
            state |= {f"directions.{name}": value for name, value in self._directions.state().items()}
        return {name: np.asarray(value) for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Self:
        """The detector whose `state()` this was; it goes on bit for bit."""
        self = cls.__new__(cls)
        self.threshold = float(state["threshold"])
        capacity, updates, crossed_at = (int(count) for count in state["counts"])
        self.capacity, self.updates = capacity, updates
        self.crossed_at = None if crossed_at < 0 else crossed_at
        self._lots = lots_from(state["lots"])
        self._reference = [array("f", np.ascontiguousarray(column).tobytes()) for column in state["reference"]]
        self._bags = [array("f", np.ascontiguousarray(bag).tobytes()) for bag in state["bags"]]
        self._scores = _Bank.from_state(_below(state, "scores."))
        learned = _below(state, "directions.")
        self._directions = _Directions.from_state(learned, capacity) if learned else None
        self._moved = np.array(state["moved"])
        self._shift = np.array(state["shift"])
        self._seen = np.array(state["seen"])
        return self

    def _rank(self, scores: NDArray[np.float32]) -> Floats:
        """(k,) smoothed conformal p-values of `scores` among the bags, which take them in."""
        k, m = len(self._bags), len(self._bags[0])
        ties = self._lots.random(k).tolist()
        full = m >= self.capacity
        # By lot among all m + 1, the new one included: a rule that looks at age would let ranks tell of later ranks.
        leave = self._lots.integers(m + 1, size=k).tolist() if full else None
        p = np.empty(k)
        for i, score in enumerate(scores.tolist()):
            bag = self._bags[i]
            less = bisect_left(bag, score)
            upto = bisect_right(bag, score, less) if less < m and bag[less] == score else less
            p[i] = (less + ties[i] * (upto - less + 1)) / (m + 1)
            bag.insert(less, score)
            if leave is not None:
                del bag[leave[i]]
        return p

    def _gauge(self, scores: NDArray[np.float32]) -> None:
        n = len(self._reference[0])
        ranks = np.empty(len(scores))
        for i, score in enumerate(scores.tolist()):
            known = self._reference[i]
            less = bisect_left(known, score)
            upto = bisect_right(known, score, less) if less < n and known[less] == score else less
            ranks[i] = (less + upto) / (2 * n)
        fade = 0.5 ** (1 / EFFECT_HALF_LIFE)
        self._shift = self._shift * fade + (ranks - 0.5)
        self._seen = self._seen * (fade, fade * fade) + 1


class _Bank:
    """n streams of p-values, each with every bet of BETS and its Shiryaev-Roberts evidence, in log space."""

    def __init__(self, n: int, grant: float = 1.0) -> None:
        # What R may grow by in the mean at each p-value: 1, or 2 for streams that see every second request.
        self.grant = grant
        self.log_r = np.full((len(BETS), n), -np.inf)
        # Page's statistic of the same bets, which falls to 0 before a change and tells after which update it last did.
        self._page = np.zeros((len(BETS), n))
        self._start = np.zeros((len(BETS), n), np.int64)
        # All histograms in a row, without the prior: of each stream the bins of each bet. To fade them would touch
        # every bin at every request; instead each request weighs more than the one before: `_unit` is what 1 is now.
        self._learned = np.zeros(n * _BINS_OF_A_STREAM)
        self._unit = np.ones((len(BETS), 1))
        self._weight = np.zeros((len(BETS), 1))
        self._first_bin = np.arange(n) * _BINS_OF_A_STREAM + _FIRST_BINS

    def observe(self, p: Floats, now: int) -> None:
        """Bet on `p` (n,), each in [0, 1), then learn it."""
        bins = np.minimum((p * _BINS).astype(np.intp), _BINS - 1) + self._first_bin
        # Towards the prior, which never fades: a bin that is never hit keeps a density.
        density = (PRIOR + _BINS * self._unit * self._learned[bins]) / (PRIOR + self._weight)
        log_e = np.log(UNIFORM + (1 - UNIFORM) * density)
        self._unit *= _FADES
        self._weight = self._weight * _FADES + 1
        self._learned[bins] += 1 / self._unit
        if self._unit.min() < SMALLEST_UNIT:
            self._learned.reshape(-1, _BINS_OF_A_STREAM)[:] *= np.repeat(self._unit, _BINS.ravel())
            self._unit[:] = 1
        self.log_r = np.logaddexp(self.log_r, math.log(self.grant)) + log_e
        self._page = np.maximum(self._page, 0) + log_e
        self._start[self._page <= 0] = now

    def log_mean(self) -> float:
        return _log_mean(self.log_r.ravel())

    def log_means(self) -> Floats:
        """(n,): of each stream over its bets."""
        return np.logaddexp.reduce(self.log_r, axis=0) - math.log(len(BETS))

    def began(self) -> int:
        return int(self._start.flat[self._page.argmax()])

    def reset(self, now: int) -> None:
        self.log_r[:] = -np.inf
        self._page[:] = 0
        self._start[:] = now

    def state(self) -> State:
        betting = {"log_r": self.log_r, "page": self._page, "start": self._start, "grant": np.array(self.grant)}
        learning = {"learned": self._learned, "unit": self._unit, "weight": self._weight}
        return {name: value.copy() for name, value in (betting | learning).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Self:
        self = cls(state["log_r"].shape[1], float(state["grant"]))
        self.log_r = np.array(state["log_r"])
        self._page = np.array(state["page"])
        self._start = np.array(state["start"])
        self._learned = np.array(state["learned"])
        self._unit = np.array(state["unit"])
        self._weight = np.array(state["weight"])
        return self


class _Directions:
    """F: directions in which live requests leave the reference, learned on odd requests and tested on even ones."""

    def __init__(self, reference: NDArray[np.float32], capacity: int) -> None:
        n, k = reference.shape
        # float64, though scores are float32: equal rows must have equal projections after rounding, or ties break.
        self._bag = np.empty((capacity, k))
        self._bag[:n] = reference
        self._size = n
        self._sum = self._bag[:n].sum(axis=0)
        self._live = np.zeros((len(DIRECTIONS), k))
        self._weight = np.zeros((len(DIRECTIONS), 1))
        self.bank = _Bank(len(DIRECTIONS), grant=2.0)

    def observe(self, scores: NDArray[np.float32], now: int, lots: np.random.Generator) -> None:
        row = scores.astype(np.float64)
        if now % 2:
            self._teach(row)
        else:
            self._test(row, now, lots)

    def _teach(self, row: Floats) -> None:
        fade = np.array([[0.5 ** (1 / half_life)] for half_life in DIRECTIONS])
        self._live = self._live * fade + row
        self._weight = self._weight * fade + 1

    def _test(self, row: Floats, now: int, lots: np.random.Generator) -> None:
        m = self._size
        w = self._live / self._weight - (self._sum + row) / (m + 1)
        along = (w @ self._bag[:m].T).astype(np.float32)
        mine = (w @ row).astype(np.float32)[:, None]
        less = np.count_nonzero(along < mine, axis=1)
        equal = np.count_nonzero(along == mine, axis=1)
        self.bank.observe((less + lots.random(len(w)) * (equal + 1)) / (m + 1), now)
        if m < len(self._bag):
            self._bag[m] = row
            self._size += 1
        else:
            leaves = int(lots.integers(m + 1))
            if leaves == m:
                return
            self._sum -= self._bag[leaves]
            self._bag[leaves] = row
        self._sum += row

    def state(self) -> State:
        mine = {
            "bag": self._bag[: self._size].astype(np.float32),  # which it came from: nothing is lost
            "sum": self._sum.copy(),
            "live": self._live.copy(),
            "weight": self._weight.copy(),
        }
        return mine | {f"bank.{name}": value for name, value in self.bank.state().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray], capacity: int) -> Self:
        self = cls(state["bag"], capacity)
        self._sum = np.array(state["sum"])
        self._live = np.array(state["live"])
        self._weight = np.array(state["weight"])
        self.bank = _Bank.from_state(_below(state, "bank."))
        return self


def _log_mean(values: Floats) -> float:
    top = values.max()
    if top == -np.inf:
        return -math.inf
    return float(top + math.log(np.exp(values - top).mean()))


def _below(state: Mapping[str, NDArray], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


_WORD = (1 << 64) - 1


def lots_state(lots: np.random.Generator) -> NDArray[np.uint64]:
    """PCG64's two 128-bit numbers and its half-used word, as six 64-bit ones."""
    inner = lots.bit_generator.state
    numbers: Sequence[int] = (inner["state"]["state"], inner["state"]["inc"])
    words = [part for number in numbers for part in (number >> 64, number & _WORD)]
    return np.array([*words, inner["has_uint32"], inner["uinteger"]], np.uint64)


def lots_from(words: NDArray[np.uint64]) -> np.random.Generator:
    """The generator whose `lots_state` this was."""
    a, b, c, d, has, half = (int(word) for word in words)
    inner = np.random.PCG64()
    inner.state = {
        "bit_generator": "PCG64",
        "state": {"state": a << 64 | b, "inc": c << 64 | d},
        "has_uint32": has,
        "uinteger": half,
    }
    return np.random.Generator(inner)
