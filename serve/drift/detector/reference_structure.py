"""What time does to the requests of a reference, and how later ones are compared in spite of it.

    scale, structure, reference = fit(kind, rows)    # raw rows of the reference, in the order in which they came
    row = structure.unit(scale(raw))                 # what the detector takes next; None: its block is not full

The detector's promise needs exchangeable requests (`detector.detector`), and time makes them unlike in two ways.
Both are estimated from the reference in the order in which it came. A reference that shows neither leaves every row as
it is, to the bit.

Near in time and alike: sessions on a topic, a user's habits. The integrated autocorrelation time tau (Sokal, Monte
Carlo Methods in Statistical Mechanics, 1997) says how many requests are worth one. It is taken from normal scores, so
that heavy tails count no more than others, without what is slower than `SLOW` requests, and compared with Bartlett's
variance of the autocorrelations of independent requests (1946), for each score and for the mean of all. Above that
bound the unit that is ranked becomes the mean of a block of consecutive requests (Carlstein, Annals of Statistics
14, 1986). Means of neighbouring blocks have a correlation of about (tau^2 - 1) / (4 tau B), as for AR(1). What a
learned direction wins from it grows with its square and with the number of units, hence
B ~ ((tau^2 - 1) / (4 tau))^(2/3).

Slow: a day's wave, a week, topics that come and go. One cycle may be all that was seen, and its clock is not known. A
score wanders if its slowest cosines have more power than permutations of the reference give them, for some score or for
all together, and with it those that are correlated with it. What is usual for it then depends on its level of the
moment, an exponentially weighted mean of the units before, with the memory that predicts the reference best (Muth,
Optimal Properties of Exponentially Weighted Forecasts, 1960). The score is replaced by its rank among those units of
the reference that came at nearly the same level (localized conformal prediction: Guan, Biometrika 110, 2023). That rank
is uniform at every level that the reference had, whatever changes with it: the mean, or the shares of two topics. A
level beyond all of the reference's has the last ones as neighbours: what moves further than the reference did is left
over and counts, what stays within is not seen for longer than the memory. Scores that do not wander stay as sharp as
they were.

Neither is a theorem as exchangeability is. For the waves, sessions and autoregressions of `make drift-time` the false
alarms were counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.features import Scale
from serve.drift.state_arrays import below, prefixed

Floats: TypeAlias = NDArray[np.floating]

# Fewer requests say nothing about time.
FEWEST = 100
# Periods above so many requests are slow: no matter for blocks.
SLOW = 200
# Lags of the autocorrelation, in requests; its sums over the first 1, 2, 4, ... lags are tested.
LAGS = 50
# In standard errors: what the sum of a score's autocorrelations stays below, for all scores and lags; and their mean.
EACH, POOLED = 4.6, 3.7
# B of that power law; fitted to a mean of less than one nat from 20,000 requests with 33 scores.
BLOCKS = 24.0
# A reference has at least so many blocks; with fewer units nothing is said about what is slow.
UNITS = 20
# Slowest cosines that are tested together.
BANDS = (2, 4, 8, 16)
PERMUTATIONS = 100
# Probability that an exchangeable reference is said to wander; in one that does, that a score is which does not.
ALPHA, ALPHA_EACH = 1e-3, 0.02
# Correlation from which on a score goes with one that does.
TOGETHER = 0.5
# Memories that are tried, in units.
MEMORIES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# Units of the reference that a unit is ranked among, where its score wanders: this share of them, those at its level.
NEAR, FEWEST_NEAR = 1 / 8, 8


@dataclass(slots=True, eq=False)
class ReferenceStructure:
    """autocorrelation: tau in requests, 1 where they are independent. block: requests in a unit; `waiting`: those of
    one that is not full. requests: of the reference that was looked at, 0 if none was."""

    scores: int
    autocorrelation: float = 1.0
    block: int = 1
    requests: int = 0
    _sum: Floats = field(init=False)
    waiting: int = field(init=False, default=0)
    _wander: Wander | None = field(init=False, default=None)
    margin: Floats | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.scores)

    @property
    def exchangeable(self) -> bool:
        """Whether nothing speaks against it in the reference."""
        return self.block == 1 and self._wander is None

    def begin(self, scores: Floats, seed: int = 0, *, slow: bool = False) -> NDArray[np.float32]:
        """(units, k) of the reference's scores (n, k) in the order in which they came. Finds out which wander; slow:
        all that vary do."""
        units = [unit for row in scores if (unit := self._block_mean(row)) is not None]
        self._sum[:], self.waiting = 0, 0
        reference = np.array(units, np.float32)
        rng = np.random.Generator(np.random.PCG64(seed))
        wanders = reference.std(axis=0) > 0 if slow else wandering(reference, rng)
        if wanders.any():
            self._wander, reference = Wander.follow(reference, np.flatnonzero(wanders))
            self.margin = np.where(wanders, _slow_amplitude(reference), 0.0)
        return reference

    def unit(self, scores: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take (k,) scores of one request; (k,) of the unit that it completes, as the detector takes it."""
        unit = self._block_mean(scores)
        return unit if unit is None or self._wander is None else self._wander.adjust(unit)

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """What is known about time, for people; `names` of the scores."""
        tolerance = 0.0
        widest = ""
        count = 0
        if self._wander is not None:
            i = int(self._wander.tolerance.argmax())
            tolerance = float(self._wander.tolerance[i]) / self._stretch
            widest, count = names[self._wander.scores[i]], len(self._wander.scores)
        return {
            "autocorrelation": round(self.autocorrelation, 2),
            "block": self.block,
            "wander": round(tolerance, 2),
            "wander_score": widest or None,
            "wandering_scores": count,
            "promise": self._promise(widest, tolerance, count),
        }

    def state(self) -> dict[str, NDArray]:
        numbers = [self.autocorrelation, self.block, self.requests, self.waiting]
        state = {"numbers": np.array(numbers, np.float64), "sum": self._sum.copy()}
        if self._wander is not None:
            state |= prefixed(self._wander.state(), "wander.")
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray], scores: int) -> Self:
        """What `state()` wrote; without structure where nothing was written, as by earlier releases."""
        self = cls(scores)
        if not state:
            return self
        autocorrelation, block, requests, waiting = state["numbers"].tolist()
        self.autocorrelation, self.block = autocorrelation, int(block)
        self.requests, self.waiting = int(requests), int(waiting)
        self._sum[:] = state["sum"]
        wander = {name: np.array(value) for name, value in below(state, "wander.").items()}
        if wander:
            self._wander = Wander(**wander)
        return self

    @property
    def _stretch(self) -> float:
        """By which a mean over a block has about the spread of one request."""
        return math.sqrt(self.block / self.autocorrelation) if self.block > 1 else 1.0

    def _block_mean(self, scores: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if self.block == 1:
            return scores
        self._sum += scores
        self.waiting += 1
        if self.waiting < self.block:
            return None
        unit = np.asarray(self._sum * (self._stretch / self.block), np.float32)
        self._sum[:], self.waiting = 0, 0
        return unit

    def _promise(self, score: str, tolerance: float, count: int) -> str:
        if not self.requests:
            return "the reference says nothing about time; requests are taken to be exchangeable with it"
        parts = []
        if self.block > 1:
            parts.append(
                f"requests near in time are alike in the reference ({self.autocorrelation:.1f} are worth one): "
                f"ranked in blocks of {self.block}"
            )
            if self.block < _wanted_block(self.autocorrelation):
                parts.append("it is too short for blocks that are independent, so false alarms are more likely")
        if count:
            parts.append(
                f"{count} of {self.scores} scores change slowly in the reference: as far as they did, it is not seen "
                f"(`{score}`: below {tolerance:.1f} sd)"
            )
        return "; ".join(parts) or "requests are exchangeable in the reference, as far as it shows"


@dataclass(slots=True, eq=False)
class Wander:
    """The scores that wander, and what they were in the reference at each level of theirs.

    scores: (w,) their numbers. gain: (w,) weight of a new unit in the level. levels, values: (w, n) of the reference's
    units, in the order of the level before each. level: (w,) now. tolerance: (w,) how far from its mean a score was at
    the ends.
    """

    scores: NDArray[np.intp]
    gain: Floats
    levels: Floats
    values: Floats
    level: Floats
    tolerance: Floats

    @classmethod
    def follow(cls, units: NDArray[np.float32], scores: NDArray[np.intp]) -> tuple[Self, NDArray[np.float32]]:
        """From the reference's units (n, k) in order; also the units as `adjust` would give them."""
        n, columns = len(units), units[:, scores].astype(np.float64)
        tried = np.array([memory for memory in MEMORIES if memory <= n / 4])
        levels = _levels(columns, tried)  # (memories, n + 1, w)
        # Half of the best memory: what lags behind is worse than what is noise.
        best = np.maximum(((columns - levels[:, :-1]) ** 2).mean(axis=1).argmin(axis=0) - 1, 0)
        followed = levels[best, :, np.arange(len(scores))]  # (w, n + 1)
        order = followed[:, :-1].argsort(axis=1)
        values = np.take_along_axis(columns.T, order, axis=1)
        near = _neighbours(n)
        ends = np.array([values[:, :near].mean(axis=1), values[:, -near:].mean(axis=1)]) - values.mean(axis=1)
        self = cls(
            scores,
            1 / tried[best],
            np.take_along_axis(followed[:, :-1], order, axis=1),
            values,
            followed[:, -1].copy(),
            np.abs(ends).max(axis=0),
        )
        places = order.argsort(axis=1)  # (w, n): where each unit is in that order
        adjusted = units.copy()
        for i in range(n):
            adjusted[i, scores] = self._ranked(columns[i], places[:, i], itself=True)
        return self, adjusted

    def adjust(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """(k,): the scores that wander by their rank at this level, the others as they are; the level moves on."""
        values = unit[self.scores].astype(np.float64)
        adjusted = unit.copy()
        places = (self.levels < self.level[:, None]).sum(axis=1)
        adjusted[self.scores] = self._ranked(values, places)
        self.level += self.gain * (values - self.level)
        return adjusted

    def state(self) -> dict[str, NDArray]:
        return {name: getattr(self, name).copy() for name in self.__slots__}

    def _ranked(self, values: Floats, places: NDArray[np.intp], *, itself: bool = False) -> Floats:
        """(w,) normal scores of the values' ranks among the neighbours of `places`; beyond all of them, by how far.

        itself: the values are those at `places`, and are not among their neighbours.
        """
        n = self.levels.shape[1]
        count = _neighbours(n)
        first = np.minimum(np.maximum(places - count // 2, 0), n - count - itself)
        at = first[:, None] + np.arange(count)
        if itself:
            at += at >= places[:, None]
        near = np.take_along_axis(self.values, at, axis=1)
        below = (near < values[:, None]).sum(axis=1) + (near <= values[:, None]).sum(axis=1)
        beyond = np.maximum(values - near.max(axis=1), 0) + np.minimum(values - near.min(axis=1), 0)
        return _normal_quantiles(count)[below] + beyond


def fit(
    kind: str, rows: Sequence[NDArray], *, surprises: int = 0, seed: int = 0, ordered: bool = True, slow: bool = False
) -> tuple[Scale, ReferenceStructure, NDArray[np.float32]]:
    """The scale, the structure and the units (m, k) to be ranked among, of the reference's raw rows of a signal.

    surprises: how many columns are scores of tokens. ordered: the rows are in the order in which they came. slow:
    something else says that they change slowly. One half
    fits the scale and the other is ranked (`serve.drift.features.features`). Alternating, so that both span all the
    time: requests, or blocks of them.
    """
    raw = np.array(rows)
    scale = Scale.fit(kind, raw[::2], surprises=surprises)
    # One by one, as live rows will be: a product of many rows may round otherwise, and equal rows must stay ties.
    scores = scale.each(raw)
    if not ordered or len(raw) < FEWEST:
        return scale, ReferenceStructure(scores.shape[1]), scores[1::2]
    tau = autocorrelation_time(scores)
    block = block_length(tau, len(raw))
    if block > 1:
        scale = Scale.fit(kind, raw[np.arange(len(raw)) // block % 2 == 0], surprises=surprises)
        scores = scale.each(raw)
    structure = ReferenceStructure(scores.shape[1], tau, block, len(raw))
    return scale, structure, structure.begin(scores, seed, slow=slow)[1::2]


def autocorrelation_time(scores: Floats) -> float:
    """tau of requests (n, k) in order, in requests: 1 if they may be independent."""
    n = len(scores)
    z = _normal_scores(scores)
    if n < FEWEST or not z.shape[1]:
        return 1.0
    # The mean and all that is slow is no matter here.
    slow = np.concatenate((np.full((n, 1), n**-0.5), _cosines(n, 2 * n // SLOW)), axis=1)
    z = z - slow @ (slow.T @ z)
    z /= np.sqrt((z**2).mean(axis=0))
    lags = np.arange(1, min(LAGS, n // 10) + 1)
    # What was taken off white noise leaves it a negative autocorrelation, by so much; tau times that, where tau is.
    lost = np.array([(slow[lag:] * slow[:-lag]).sum() / (n - slow.shape[1]) for lag in lags])
    r = np.array([(z[lag:] * z[:-lag]).sum(axis=0) / n for lag in lags])  # (lags, k)
    first = 2 ** np.arange(int(math.log2(len(lags))) + 1)
    sums = (r + lost[:, None]).cumsum(axis=0)[first - 1] / np.sqrt(first / n)[:, None]
    # Autocorrelations of two scores with the correlation c have the correlation c^2.
    error = math.sqrt(((z.T @ z / n) ** 2).sum()) / z.shape[1]
    dependent = (sums > EACH).any(axis=0)
    tau = _integrated(r[:, dependent].mean(axis=1), lost) if dependent.any() else 1.0
    if (sums.mean(axis=1) / error > POOLED).any():
        tau = max(tau, _integrated(r.mean(axis=1), lost))
    return tau


def block_length(autocorrelation: float, requests: int) -> int:
    """Requests in a block, so that block means are nearly independent: 1 if requests are."""
    return 1 if autocorrelation == 1 else max(1, min(_wanted_block(autocorrelation), requests // UNITS))


def wandering(units: Floats, rng: np.random.Generator, alpha: float = ALPHA) -> NDArray[np.bool_]:
    """(k,): which scores of units (n, k), in order, change more slowly than chance lets them. alpha: the probability
    that any is said to, where nothing does."""
    n, k = units.shape
    varies = units.std(axis=0) > 0
    wanders = np.zeros(k, np.bool_)
    if n < UNITS or not varies.any():
        return wanders
    z = _normal_scores(units[:, varies])
    bands = np.array([band for band in BANDS if band <= n // 5])
    cosines = _cosines(n, int(bands[-1]))
    orders = np.array([np.arange(n), *(rng.permutation(n) for _ in range(PERMUTATIONS))])
    # To permute the cosines is to permute the units.
    power = (cosines[orders].transpose(0, 2, 1).reshape(-1, n) @ z).reshape(len(orders), -1, z.shape[1]) ** 2
    power = power.cumsum(axis=1)[:, bands - 1]  # (orders, bands, k)
    pooled = power.mean(axis=2)
    pooled = ((pooled - pooled[1:].mean(axis=0)) / pooled[1:].std(axis=0)).max(axis=1)
    # Wilson and Hilferty (1931): the cube root of a mean of squares is nearly normal.
    spread = 2 / (9 * bands)
    each = ((np.cbrt(power / bands[:, None]) - (1 - spread)[:, None]) / np.sqrt(spread)[:, None]).max(axis=1)
    strongest = each.max(axis=1)
    if pooled[0] > _bound(pooled[1:], alpha) or strongest[0] > _bound(strongest[1:], alpha):
        slow = each[0] > np.quantile(each[1:], 1 - ALPHA_EACH)
        wanders[varies] = (np.abs(z.T @ z[:, slow]) > TOGETHER * n).any(axis=1)
    return wanders


def local_range(values: Floats, count: int) -> Floats:
    """(2,): between which numbers the means of `count` neighbours among values (n,) lie; 0 is."""
    means = np.convolve(values, np.full(count, 1 / count), "valid") if len(values) >= count else np.zeros(1)
    return np.array([min(0.0, means.min()), max(0.0, means.max())])


def _slow_amplitude(units: Floats) -> Floats:
    """(k,): of the wave that has the power of the slowest cosines of units (n, k), noise included."""
    bands = [band for band in BANDS if band <= len(units) // 5]
    power = (_cosines(len(units), bands[-1]).T @ (units - units.mean(axis=0))) ** 2
    return np.sqrt(2 * power.sum(axis=0) / len(units))


def _bound(maxima: Floats, alpha: float) -> float:
    """Above it a maximum of the kind lies with a probability of `alpha`: Gumbel's law with their mean and spread."""
    scale = float(maxima.std()) * math.sqrt(6) / math.pi
    return float(maxima.mean()) - np.euler_gamma * scale - scale * math.log(-math.log1p(-alpha))


def _wanted_block(tau: float) -> int:
    return math.ceil(max(2 * tau, BLOCKS * ((tau * tau - 1) / (4 * tau)) ** (2 / 3)))


def _integrated(r: Floats, lost: Floats) -> float:
    """1 + 2 * sum of autocorrelations (lags,), up to the first lag that is five times that (Sokal)."""
    times = (1 + 2 * np.cumsum(r)) / np.maximum(1 - 2 * np.cumsum(lost), 0.5)
    enough = np.flatnonzero(np.arange(1, len(r) + 1) >= 5 * times)
    return max(1.0, float(times[enough[0] if len(enough) else -1]))


def _levels(units: Floats, memories: Floats) -> Floats:
    """(memories, n + 1, k): the exponentially weighted mean of the units before each; first the mean of one memory."""
    level = np.array([units[: int(memory)].mean(axis=0) for memory in memories])
    levels = np.empty((len(units) + 1, *level.shape))
    gain = 1 / memories[:, None]
    for i, unit in enumerate(units):
        levels[i] = level
        level += gain * (unit - level)
    levels[-1] = level
    return levels.transpose(1, 0, 2)


def _cosines(n: int, count: int) -> Floats:
    """(n, count): the slowest cosines of the DCT-II without the constant; orthonormal."""
    return np.cos(np.pi / n * np.outer(np.arange(n) + 0.5, np.arange(1, count + 1))) * math.sqrt(2 / n)


def _neighbours(units: int) -> int:
    return max(FEWEST_NEAR, int(NEAR * units))


@lru_cache
def _normal_quantiles(count: int) -> Floats:
    """(2 * count + 1,): the normal quantile of a rank among so many, by twice the mid-rank."""
    return np.array([NormalDist().inv_cdf((i + 1) / (2 * count + 2)) for i in range(2 * count + 1)])


def _normal_scores(rows: Floats) -> Floats:
    """(n, columns that vary): the normal quantile of each number's mid-rank, with mean 0 and standard deviation 1."""
    n = len(rows)
    quantile = NormalDist().inv_cdf
    table = np.array([quantile(i / (2 * n)) for i in range(1, 2 * n)])
    columns = []
    for column in np.asarray(rows).T:
        known = np.sort(column)
        z = table[known.searchsorted(column, "left") + known.searchsorted(column, "right") - 1]
        if known[0] < known[-1]:
            columns.append((z - z.mean()) / z.std())
    return np.array(columns).reshape(-1, n).T
