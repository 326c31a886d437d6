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
_BINS = np.array([bins for bins, _ in BETS])
_FADES = np.array([0.5 ** (1 / half_life) for _, half_life in BETS])
# R ends here: far above any threshold, and a bet on it overflows nothing.
MOST = 1e290
# Below it the histograms are written anew with a unit of 1.
SMALLEST_UNIT = 1e-100
# A histogram begins as this many requests spread evenly, and this much of each bet stays uniform.
PRIOR = 10.0
UNIFORM = 0.1
# Half-lives of the learned directions, in requests that teach.
DIRECTIONS = (32.0, 256.0)
_DIRECTION_FADES = np.array([[0.5 ** (1 / half_life)] for half_life in DIRECTIONS])
# Half-life of the effect gauges, in requests.
EFFECT_HALF_LIFE = 50.0
_GAUGE_FADE = 0.5 ** (1 / EFFECT_HALF_LIFE)
# Rows that the gauges take at a time: nobody reads them at every request.
GAUGED = 32


class Drift:
    """One detector over rows of k scores. Not thread-safe; `update` costs tens of microseconds.

    reference: (n, k), n >= 1; to D only its ranks matter, F also uses distances: unit scale serves it best.
    threshold: c, the mean number of requests between false alarms. capacity: rows that the bag holds, by default as
    many as the reference and at least 1,000; never fewer than the reference. seed: of the random numbers that
    break ties and choose what leaves the bag.
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
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._reference = np.ascontiguousarray(np.sort(rows, axis=0).T)  # (k, n)
        self._bags = [array("f", column.tobytes()) for column in self._reference]
        self._directions = _Directions(rows, self.capacity) if k > 1 else None
        self._bank = _Bank(k, len(DIRECTIONS) if k > 1 else 0)
        self._moved = np.full(k, -np.inf)
        self._shift = np.zeros(k)
        self._seen = np.zeros(2)  # weight of the gauges, and of its squares
        self._ungauged: list[NDArray[np.float32]] = []

    def update(self, row: ArrayLike) -> bool:
        """Take the scores of one request, and say whether the evidence has reached the threshold."""
        scores = np.asarray(row, np.float32)
        if scores.shape != self._shift.shape:
            raise ValueError(
                f"a row has the shape {scores.shape}; this detector's reference has {len(self._shift)} scores a row"
            )
        if not all_finite(scores):
            raise ValueError("a score is not a finite number; leave the request out")
        self.updates += 1
        self._ungauged.append(scores.copy())
        if len(self._ungauged) >= GAUGED:
            self._gauge()
        p = self._rank(scores)
        if self._directions is not None:
            if self.updates % 2:
                self._directions.teach(scores)
            else:
                p = np.concatenate((p, self._directions.rank(scores, self._rng)))
        self._bank.observe(p, self.updates)
        if self.crossed_at is None and self._bank.evidence() >= self.threshold:
            self.crossed_at = self.updates
            self._moved = self._bank.log_means()
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
        evidence = self._bank.evidence()
        return math.log(evidence) if evidence > 0 else -math.inf

    @property
    def evidence_by_score(self) -> Floats:
        """(k,): ln of the mean R of each score alone, to say what moved; after a crossing, as it was then."""
        return self._moved if self.drifted else self._bank.log_means()

    @property
    def changed_at(self) -> int:
        """The update after which the change began, as the strongest bet sees it."""
        return self._bank.began()

    @property
    def rank_shift(self) -> Floats:
        """(k,) in [-0.5, 0.5]: mean rank of recent requests in the reference, less a half, less its standard error.

        0.5 says that all lie above the whole reference. A share q of foreign requests shifts it by at most q / 2.
        """
        self._gauge()
        if self._seen[0] == 0:
            return np.zeros(len(self._shift))
        mean = self._shift / self._seen[0]
        return np.sign(mean) * np.maximum(np.abs(mean) - self.gauge_error / math.sqrt(12), 0)

    @property
    def gauge_error(self) -> float:
        """Standard error of a mean over recent requests, of something with a standard deviation of 1."""
        self._gauge()
        weight, squares = self._seen
        return math.sqrt(squares) / float(weight) if weight else math.inf

    def reset(self, *, effects: bool = False) -> None:
        """Begin again at no evidence, after an alarm has been dealt with; what the bag and the bets learned stays.

        effects: also forget how far recent requests lie from the reference.
        """
        self.crossed_at = None
        self._bank.reset(self.updates)
        if effects:
            self._ungauged.clear()
            self._shift[:] = 0
            self._seen[:] = 0

    def state(self) -> State:
        """All of it, as arrays for `numpy.savez`: no objects, nothing to unpickle."""
        self._gauge()
        state = {
            "reference": self._reference.T.copy(),
            "bags": np.array([np.frombuffer(bag, np.float32) for bag in self._bags]),
            "threshold": np.float64(self.threshold),
            "counts": np.array([self.capacity, self.updates, -1 if self.crossed_at is None else self.crossed_at]),
            "lots": rng_state(self._rng),
            "moved": self._moved.copy(),
            "shift": self._shift.copy(),
            "seen": self._seen.copy(),
        }
        state |= {f"bank.{name}": value for name, value in self._bank.state().items()}
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
        self._rng = rng_from(state["lots"])
        self._reference = np.ascontiguousarray(state["reference"].T)
        self._bags = [array("f", np.ascontiguousarray(bag).tobytes()) for bag in state["bags"]]
        learned = _below(state, "directions.")
        self._directions = _Directions.from_state(learned, capacity) if learned else None
        self._bank = _Bank(len(self._bags), len(DIRECTIONS) if learned else 0)
        self._bank.restore(_below(state, "bank."))
        self._moved = np.array(state["moved"])
        self._shift = np.array(state["shift"])
        self._seen = np.array(state["seen"])
        self._ungauged = []
        return self

    def _rank(self, scores: NDArray[np.float32]) -> Floats:
        """(k,) smoothed conformal p-values of `scores` among the bags, which take them in."""
        k, m = len(self._bags), len(self._bags[0])
        ties = self._rng.random(k).tolist()
        full = m >= self.capacity
        # At random among all m + 1, the new one included: if age decided, ranks would say something about later ones.
        leave = self._rng.integers(m + 1, size=k).tolist() if full else None
        p = [0.0] * k
        for i, score in enumerate(scores.tolist()):
            bag = self._bags[i]
            less = bisect_left(bag, score)
            upto = bisect_right(bag, score, less) if less < m and bag[less] == score else less
            p[i] = (less + ties[i] * (upto - less + 1)) / (m + 1)
            bag.insert(less, score)
            if leave is not None:
                del bag[leave[i]]
        return np.array(p)

    def _gauge(self) -> None:
        """Take in the rows that wait. One after another, so that it does not matter how many wait."""
        if not self._ungauged:
            return
        rows = np.array(self._ungauged)
        self._ungauged = []
        ranks = np.empty(rows.shape)
        for i, known in enumerate(self._reference):
            ranks[:, i] = known.searchsorted(rows[:, i], "left") + known.searchsorted(rows[:, i], "right")
        ranks /= 2 * self._reference.shape[1]
        ranks -= 0.5
        fades = np.array((_GAUGE_FADE, _GAUGE_FADE * _GAUGE_FADE))
        for row in ranks:
            self._shift *= _GAUGE_FADE
            self._shift += row
            self._seen *= fades
            self._seen += 1


class _Bank:
    """Streams of p-values, each with every bet of BETS and its Shiryaev-Roberts evidence: `scores` that come with every
    request, and after them `directions` that come with every second one."""

    def __init__(self, scores: int, directions: int) -> None:
        n, bets = scores + directions, len(BETS)
        self._scores = scores
        # All arrays are flat, the bets of a stream side by side: the scores alone are the beginning of each.
        self._bins, self._fades = np.tile(_BINS, n), np.tile(_FADES, n)
        self._first_bin = np.cumsum(self._bins) - self._bins
        # What R may grow by in the mean at each p-value: 1, or 2 for streams that see every second request.
        self._grant = np.repeat((1.0, 2.0), (scores * bets, directions * bets))
        # Half of the weight is the scores', if there are directions.
        weight = (0.5 if directions else 1.0) / scores, 0.5 / max(directions, 1)
        self._share = np.repeat(weight, (scores * bets, directions * bets)) / bets
        self._r = np.zeros(n * bets)
        # Page's statistic of the same bets, which falls to 1 before a change and tells after which update it last did.
        self._page = np.ones(n * bets)
        self._start = np.zeros(n * bets, np.int64)
        # The histograms without the prior. To fade them would touch every bin at every request; instead each request
        # weighs more than the one before: `_unit` is what 1 is now.
        self._learned = np.zeros(self._bins.sum())
        self._unit = np.ones(n * bets)
        self._weight = np.zeros(n * bets)

    def observe(self, p: Floats, now: int) -> None:
        """Bet on `p`, each in [0, 1), of the scores or of all streams; then learn it."""
        n = slice(len(p) * len(BETS))
        r, page, unit, weight = self._r[n], self._page[n], self._unit[n], self._weight[n]
        bins = (p.repeat(len(BETS)) * self._bins[n]).astype(np.intp)
        np.minimum(bins, self._bins[n] - 1, out=bins)
        bins += self._first_bin[n]
        # Towards the prior, which never fades: a bin that is never hit keeps a density.
        e = self._learned[bins]
        e *= self._bins[n]
        e *= unit
        e += PRIOR
        e /= weight + PRIOR
        e *= 1 - UNIFORM
        e += UNIFORM
        unit *= self._fades[n]
        weight *= self._fades[n]
        weight += 1
        self._learned[bins] += 1 / unit
        if unit[0] < SMALLEST_UNIT:  # which fades fastest
            self._learned *= self._unit.repeat(self._bins)
            self._unit[:] = 1
        r += self._grant[n]
        r *= e
        np.minimum(r, MOST, out=r)
        np.maximum(page, 1, out=page)
        page *= e
        np.minimum(page, MOST, out=page)
        self._start[n][page <= 1] = now

    def evidence(self) -> float:
        """The weighted mean of all R."""
        return float(self._r @ self._share)

    def log_means(self) -> Floats:
        """(scores,): ln of the mean over the bets of each."""
        means = self._r.reshape(-1, len(BETS))[: self._scores].mean(axis=1)
        return np.log(means, out=np.full(means.shape, -np.inf), where=means > 0)

    def began(self) -> int:
        """The update after which the strongest bet's run began."""
        return int(self._start[self._page.argmax()])

    def reset(self, now: int) -> None:
        self._r[:] = 0
        self._page[:] = 1
        self._start[:] = now

    def state(self) -> State:
        return {name: getattr(self, f"_{name}").copy() for name in _KEPT}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        for name in _KEPT:
            getattr(self, f"_{name}")[:] = state[name]


_KEPT = ("r", "page", "start", "learned", "unit", "weight")


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

    def teach(self, row: NDArray[np.float32]) -> None:
        self._live *= _DIRECTION_FADES
        self._live += row
        self._weight *= _DIRECTION_FADES
        self._weight += 1

    def rank(self, scores: NDArray[np.float32], rng: np.random.Generator) -> Floats:
        """(directions,) smoothed conformal p-values along each in the bag, which takes the row in."""
        row, m = scores.astype(np.float64), self._size
        w = self._live / self._weight - (self._sum + row) / (m + 1)
        along = (w @ self._bag[:m].T).astype(np.float32)
        projected = (w @ row).astype(np.float32)
        less = [np.count_nonzero(known < new) for known, new in zip(along, projected, strict=True)]
        equal = [np.count_nonzero(known == new) for known, new in zip(along, projected, strict=True)]
        p = (np.array(less) + rng.random(len(w)) * (np.array(equal) + 1)) / (m + 1)
        if m < len(self._bag):
            self._bag[m] = row
            self._size += 1
        else:
            leaves = int(rng.integers(m + 1))
            if leaves == m:
                return p
            self._sum -= self._bag[leaves]
            self._bag[leaves] = row
        self._sum += row
        return p

    def state(self) -> State:
        return {
            "bag": self._bag[: self._size].astype(np.float32),  # which it came from: nothing is lost
            "sum": self._sum.copy(),
            "live": self._live.copy(),
            "weight": self._weight.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray], capacity: int) -> Self:
        self = cls(state["bag"], capacity)
        self._sum = np.array(state["sum"])
        self._live = np.array(state["live"])
        self._weight = np.array(state["weight"])
        return self


def all_finite(row: NDArray[np.float32]) -> bool:
    """No number of a float32 row is infinite or none: in float64 their sum cannot overflow."""
    return math.isfinite(np.add.reduce(row, dtype=np.float64))


def _below(state: Mapping[str, NDArray], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


_WORD = (1 << 64) - 1


def rng_state(rng: np.random.Generator) -> NDArray[np.uint64]:
    """PCG64's two 128-bit numbers and its half-used word, as six 64-bit ones."""
    inner = rng.bit_generator.state
    numbers: Sequence[int] = (inner["state"]["state"], inner["state"]["inc"])
    words = [part for number in numbers for part in (number >> 64, number & _WORD)]
    return np.array([*words, inner["has_uint32"], inner["uinteger"]], np.uint64)


def rng_from(words: NDArray[np.uint64]) -> np.random.Generator:
    """The generator whose `rng_state` this was."""
    a, b, c, d, has, half = (int(word) for word in words)
    inner = np.random.PCG64()
    inner.state = {
        "bit_generator": "PCG64",
        "state": {"state": a << 64 | b, "inc": c << 64 | d},
        "has_uint32": has,
        "uinteger": half,
    }
    return np.random.Generator(inner)
