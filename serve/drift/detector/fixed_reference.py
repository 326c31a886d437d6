"""Has a share or a mean left what it was in the reference? Evidence that does not fall again while the change lasts.

    reference = FixedReference({"refusal": Kind.SHARE, "longer": Kind.RANK}, needed=1000)
    reference.update({"refusal": 0.0, "longer": 5.1}, now)     # the first `needed` of each are the reference
    reference.log_evidence, reference.moved(threshold)

The bags of `detector.detector` take in what comes, so that a share which stays higher is normal after some hundred
requests. Here each number lies between 0 and 1, and a bet on it is 1 + l (x - p): its mean is 1 where p is the mean of
x, given what came before (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024). With
R <- (R + 1) e of each bet the mean time until R reaches c is at least c (Shin, Ramdas and Rinaldo, E-detectors, 2022).

Of a SHARE p is estimated from the reference and all that came since, as (hits + 1/2) / (requests + 1): what a share
drawn by Jeffreys' law is expected to be (Krichevsky and Trofimov, IEEE Transactions on Information Theory 27, 1981).
With l = (q - p) / (p (1 - p)) the bets won since some request are the ratio of two likelihoods: of one share up to
there and q from there on, and of one share for all. So what is there now counts in both: the ratio grows as long as the
share stays near q, up to what a reference of that size can tell. R - t is a martingale, and the mean time at least c,
in the mean over the shares that the reference leaves possible; `tests/serve/drift/detector/test_fixed_reference.py`
counts it share by share.

A RANK is the place of a number among those of the reference, by its mean too: p is a half, and as much more as the
reference's own error (`SURE` standard errors).

Numbers that depend on their neighbours, a day's wave say, have local means that lie farther apart in the reference than
those of independent ones. By as much as they do, p is higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.detector.bets import Runs
from serve.drift.state_arrays import below, own, prefixed

Floats: TypeAlias = NDArray[np.floating]

# Rises that are bet on: of a share, in parts of 1; of the mean of a rank. And what each bet weighs: small rises take
# long to be seen.
RISES = np.array((0.03, 0.06, 0.12, 0.3))
RANK_RISES = np.array((0.06, 0.12, 0.2, 0.3))
BET_WEIGHTS = np.array((0.3, 0.4, 0.2, 0.1))
# Standard errors by which the mean of a rank may be off.
SURE = 3.0
# Numbers whose mean is a local one.
LOCAL = 100
# A rise of a share, and of the mean of a rank, that matters.
LEAST = {"share": 0.02, "rank": 0.1}
# Of a share that is rare, at most; and of a name.
RARE, COMMON = 0.1, 0.02
# The largest stake is so far from losing all.
_SAFE = 0.95


class Kind(Enum):
    SHARE = "share"  # of numbers from 0 to 1
    RARE_SHARE = "rare_share"  # of such that are mostly 0: nothing follows of one above RARE
    RARE_NAME = "rare_name"  # of numbers that stand for names, those that are rarer than COMMON each; 0 for none
    RANK = "rank"  # of a number that is higher
    LOW_RANK = "low_rank"  # of one that is lower


SHARES = frozenset({Kind.SHARE, Kind.RARE_SHARE, Kind.RARE_NAME})


@dataclass(frozen=True, slots=True)
class Moved:
    """One number that left its reference: its mean there, and since `since` (seconds) over `count` units."""

    name: str
    before: float
    now: float
    since: float
    count: int
    log_evidence: float


class _Units(NamedTuple):
    """Some units: the number of the one before the first, when each came, and (3, units + 1, numbers) the totals before
    them and with each."""

    before: int
    nows: Floats
    totals: Floats


class FixedReference:
    """kinds: by name. needed: of each number for its reference. weights: what each weighs in the evidence, 1 by
    default. Not thread-safe."""

    def __init__(self, kinds: Mapping[str, Kind], needed: int, weights: Mapping[str, float] | None = None) -> None:
        self.kinds = dict(kinds)
        self.needed = needed
        n = len(self.kinds)
        given = np.array([1.0 if weights is None else weights.get(name, 1.0) for name in self.kinds])
        self._weights = given / given.sum()
        self._gathered: list[list[float]] = [[] for _ in self.kinds]
        self._ready = np.zeros(n, np.bool_)
        # A share is expected to be what it was in so many units of such a sum, those of the reference, and all since; a
        # rank a half; and either by its margin more.
        self._share = np.array([kind in SHARES for kind in self.kinds.values()])
        self._units, self._sum = np.zeros((2, n))
        self._margin = np.zeros(n)
        # By number and rise: the mean that is bet on, and the bets.
        self._higher, self._runs = np.zeros((n, len(RISES))), Runs(n * len(RISES))
        # In the reference: its size, and the mean, of a rank that of the number.
        self._size, self._before = np.zeros(n), np.zeros(n)
        # Of what came after the reference: how many, the sum of the numbers, and that of what is bet on. By number and
        # rise, when the bets last won nothing, and the totals then.
        self._totals = np.zeros((3, n))
        self._since, self._began = np.zeros((n, len(RISES))), np.zeros((3, n, len(RISES)))
        # Of a rank the sorted numbers, of names those that are common.
        self._sorted, self._common = dict[int, Floats](), dict[int, Floats]()
        self._count = 0  # of units, and those that are placed now
        self._placed: _Units | None = None

    def gather(self, needed: int) -> None:
        """So many make a reference, where none is full yet."""
        self.needed = needed

    @property
    def gathered(self) -> int:
        """How many units the first number has in its reference."""
        return self.needed if self._ready[0] else len(self._gathered[0])

    @property
    def watching(self) -> bool:
        return bool(self._ready.any())

    @property
    def log_evidence(self) -> float:
        """ln of the weighted mean over the numbers."""
        evidence = float(self.evidence @ self._weights)
        return math.log(evidence) if evidence > 0 else -math.inf

    def update(self, values: Mapping[str, float | None], now: float) -> None:
        """Take in one unit; what is missing, or None, is left out."""
        for _ in self.steps([values], [now]):
            pass

    def steps(self, units: Sequence[Mapping[str, float | None]], nows: Sequence[float]) -> Iterator[None]:
        """`update` with each of several units, to be run to its end: faster than one by one, with the same numbers."""
        rows = self._read(units)
        seen, _, x = rows
        totals = np.concatenate((self._totals[:, None], rows), axis=1).cumsum(axis=1)
        self._placed = _Units(self._count, np.array(nows), totals)
        expected = self._expected(totals[0, :-1], totals[2, :-1])
        # What is missing multiplies by 1 and adds 0.
        stakes, numbers = self._stakes(expected), range(self._count + 1, self._count + 1 + len(units))
        bets = 1 + stakes * ((x - expected) * seen)[..., None]
        placed = (stakes > 0) * seen[..., None]
        for _ in self._runs.steps(bets.reshape(len(units), -1), numbers, placed.reshape(len(units), -1)):
            self._count += 1
            yield
        self._since, self._began = self._since_then(self._placed)
        self._totals, self._placed = totals[:, -1].copy(), None

    def _read(self, units: Sequence[Mapping[str, float | None]]) -> Floats:
        """(3, units, numbers): 1 for what there is besides the reference; the numbers, and what is bet on, or 0."""
        raw = np.array([[unit.get(name) for name in self.kinds] for unit in units], np.float64)
        for i in np.flatnonzero(~self._ready).tolist():
            self._gather(i, raw[:, i])
        seen = np.isfinite(raw) & self._ready
        raw = np.where(seen, raw, 0)
        for i, common in self._common.items():
            raw[:, i] = _rare(raw[:, i], common)
        x = raw.copy()
        for i in self._sorted:
            x[:, i] = self._ranks(i, raw[:, i]) * seen[:, i]
        return np.array((seen, raw, x))

    def _since_then(self, placed: _Units) -> tuple[Floats, Floats]:
        """By number and rise, when the bets last won nothing, and the totals then."""
        start = self._runs.start.reshape(self._since.shape) - placed.before
        among, at = start > 0, np.maximum(start, 1)
        then = placed.totals[:, at, np.arange(len(at))[:, None]]
        return np.where(among, placed.nows[at - 1], self._since), np.where(among, then, self._began)

    def _expected(self, units: ArrayLike = 0.0, total: ArrayLike = 0.0) -> Floats:
        """(..., numbers): the mean of each, given what came before, and so many units of that sum."""
        total, units = self._sum + self._share * total, self._units + self._share * units
        return np.minimum((total + 0.5) / (units + 1) + self._margin, _SAFE)

    def _stakes(self, expected: Floats) -> Floats:
        """(..., numbers, rises): as the ratio of likelihoods of a share that is higher; no rank is 0 or 1 alone."""
        spread = np.where(self._share, expected * (1 - expected), 1 / 12)
        rises = np.maximum(self._higher - expected[..., None], 0)
        stakes: Floats = np.minimum(rises / spread[..., None], _SAFE / expected[..., None])
        return stakes

    def moved(self, log_threshold: float) -> list[Moved]:
        """Numbers whose own part of the evidence is beyond the threshold, by as much as matters; the strongest
        first."""
        least = math.exp(min(log_threshold, 700.0))
        if self._runs.r.max(initial=0.0) < least:  # and so are their weighted means
            return []
        moved, kinds = [], list(self.kinds.items())
        evidence = self.evidence * self._weights
        totals = self._totals
        since, began = self._since, self._began
        if self._placed is not None:
            totals = self._placed.totals[:, self._count - self._placed.before]
            since, began = self._since_then(self._placed)
        tallies = totals[..., None] - began
        strongest = self._runs.page.reshape(since.shape).argmax(axis=1)
        for i in np.flatnonzero(evidence >= least).tolist():
            (name, kind), best = kinds[i], (i, strongest[i])
            count, total, bet_on = (float(tally[best]) for tally in tallies)
            if not count:
                continue
            before, now = float(self._before[i]), total / count
            if kind in SHARES:
                matters = now - before >= LEAST["share"]
            else:
                matters = bet_on / count - 0.5 >= LEAST["rank"]
            if matters:
                moved.append(Moved(name, before, now, float(since[best]), int(count), math.log(evidence[i])))
        return sorted(moved, key=lambda each: -each.log_evidence)

    def reset(self) -> None:
        """An alarm has been dealt with: the evidence begins again at nothing, the reference stays."""
        self._runs.reset(self._count)
        self._began[:] = self._totals[..., None]
        self._units[:] = self._share * (self._size - self._totals[0])
        self._sum[:] = self._share * (self._size * self._before - self._totals[2])

    @property
    def evidence(self) -> Floats:
        """(numbers,): the mean of R over the bets, 0 while a number has no reference."""
        evidence: Floats = self._runs.r.reshape(self._higher.shape) @ BET_WEIGHTS
        return evidence

    def _ranks(self, i: int, values: Floats) -> Floats:
        """Of values of a number that is a rank: the middle of those that are equal."""
        reference = self._sorted[i]
        ranks: Floats = (reference.searchsorted(values) + reference.searchsorted(values, "right")) / (
            2 * len(reference)
        )
        return ranks if list(self.kinds.values())[i] is Kind.RANK else 1 - ranks

    def _gather(self, i: int, values: Floats) -> None:
        """Take what the reference of a number still needs out of the values."""
        taken = np.flatnonzero(np.isfinite(values))[: max(self.needed - len(self._gathered[i]), 0)]
        self._gathered[i] += values[taken].tolist()
        values[taken] = math.nan
        if len(self._gathered[i]) >= self.needed:
            self._freeze(i)

    def _freeze(self, i: int) -> None:
        values, kind = np.array(self._gathered[i]), list(self.kinds.values())[i]
        self._gathered[i] = []
        if kind is Kind.RARE_NAME:
            names, counts = np.unique(values, return_counts=True)
            self._common[i] = names[counts > COMMON * len(values)]
            values = _rare(values, self._common[i])
        self._size[i], self._before[i] = len(values), values.mean()
        rises = RISES
        if kind in SHARES:
            self._units[i], self._sum[i] = len(values), values.sum()
        else:
            self._sorted[i] = np.sort(values)
            values = self._ranks(i, values)
            self._margin[i], rises = SURE / math.sqrt(12 * len(values)), RANK_RISES
        self._margin[i] += _wander(values)
        if kind is not Kind.RARE_SHARE or self._before[i] <= RARE:
            self._higher[i] = np.minimum(self._expected()[i] + rises, 1)
        self._ready[i] = True

    def state(self) -> dict[str, NDArray]:
        """All of it as arrays."""
        gathered = [np.array(values, np.float64) for values in self._gathered]
        sizes = np.array([len(values) for values in gathered])
        state = {name: getattr(self, f"_{name}").copy() for name in _KEPT} | prefixed(self._runs.state(), "runs.")
        state["units_seen"] = np.array(self._count)
        state |= {"names": np.array(list(self.kinds), "U32"), "needed": np.array(self.needed), "sizes": sizes}
        state["gathered"] = np.concatenate(gathered) if gathered else np.zeros(0)
        for kept, columns in (("sorted", self._sorted), ("common", self._common)):
            state |= {f"{kept}.{list(self.kinds)[i]}": values.copy() for i, values in columns.items()}
        return state

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where the one was whose `state()` this is. Nothing of one with other numbers: they begin anew."""
        if "totals" not in state or state["names"].tolist() != list(self.kinds):
            return
        self.needed, self._count = int(state["needed"]), int(state["units_seen"])
        self._runs.restore(below(state, "runs."))
        for name in _KEPT:
            kept = getattr(self, f"_{name}")
            kept[...] = own(kept.shape, state[name], kept.dtype)
        gathered = np.split(state["gathered"], np.cumsum(state["sizes"])[:-1])
        self._gathered = [values.tolist() for values in gathered]
        for kept, columns in (("sorted.", self._sorted), ("common.", self._common)):
            known = below(state, kept)
            columns.clear()
            columns.update({i: np.array(known[name]) for i, name in enumerate(self.kinds) if name in known})


_KEPT = ("ready", "units", "sum", "margin", "higher", "size", "before", "since", "began", "totals")


def _rare(values: Floats, common: Floats) -> Floats:
    """1 for a name that is none of the common ones."""
    return np.where((values != 0) & ~np.isin(values, common), 1.0, 0.0)


def _wander(values: Floats) -> float:
    """How much farther local means lie above the mean than those of independent numbers do."""
    blocks = len(values) // LOCAL
    if blocks < 2:
        return 0.0
    local = values[: blocks * LOCAL].reshape(blocks, LOCAL).mean(axis=1)
    spread = max(float(values.std()), 1 / LOCAL)
    # Of something rare two more come together by chance than a normal distribution has it.
    usual = SURE * spread / math.sqrt(LOCAL) + 2 / LOCAL
    return max(0.0, float(local.max() - values.mean()) - usual)
