"""Has a share or a mean left what it was in the reference? Evidence that never learns what is there now.

    reference = FixedReference({"refusal": Kind.SHARE, "longer": Kind.RANK}, needed=1000)
    reference.update({"refusal": 0.0, "longer": 5.1}, now)     # the first `needed` of each are the reference
    reference.log_evidence, reference.moved(threshold)

The bags of `detector.detector` take in what comes, so that a share which stays higher is normal after some hundred
requests. Here each number lies between 0 and 1, and a bet on it is 1 + l (x - p): its mean is at most 1 as long as the
mean of x, given what came before, is at most p (Waudby-Smith and Ramdas, Estimating means of bounded random variables
by betting, 2024). With R <- (R + 1) e of each bet the mean time until R reaches c is at least c (Shin, Ramdas and
Rinaldo, E-detectors, 2022).

What p is, the reference tells with an error. So R is kept for a grid of p, and each counts as much as the reference
speaks against that p: E(p), a mean of such bets on the reference, is an e-value if p is the mean. Given the reference
the time until E(p) R(p) reaches c is at least c / E(p) in the mean, and by Jensen's inequality at least c over all
references. The evidence is the least of the grid's, which is not above that of the true p.

A RANK is the place of a number among those of the reference, by its mean too: p is a half, and as much more as the
reference's own error (`SURE` standard errors).

Numbers that depend on their neighbours, a day's wave say, have local means that lie farther apart in the reference than
those of independent ones. By as much as they do, p is higher.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.drift.state_arrays import own

Floats: TypeAlias = NDArray[np.floating]

# Rises that are bet on: of a share, in parts of 1; of the mean of a rank. And what each bet weighs: small rises take
# long to be seen.
RISES = np.array((0.03, 0.06, 0.12, 0.3))
RANK_RISES = np.array((0.06, 0.12, 0.2, 0.3))
BET_WEIGHTS = np.array((0.3, 0.4, 0.2, 0.1))
# Shares that are tried for the reference's: so many, up to so many standard errors above the one that was seen.
GRID, FARTHEST = 16, 6.0
# Standard errors by which the mean of a rank may be off.
SURE = 3.0
# Numbers whose mean is a local one.
LOCAL = 100
# A rise of a share, and of the mean of a rank, that matters.
LEAST = {"share": 0.02, "rank": 0.1}
# The largest stake is so far from losing all.
_SAFE = 0.95


class Kind(Enum):
    SHARE = "share"  # of numbers from 0 to 1
    RANK = "rank"  # of a number that is higher
    LOW_RANK = "low_rank"  # of one that is lower


@dataclass(frozen=True, slots=True)
class Moved:
    """One number that left its reference: its mean there, and since `since` (seconds) over `count` units."""

    name: str
    before: float
    now: float
    since: float
    count: int
    log_evidence: float


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
        # By number, share of the grid and rise.
        self._shares, self._against = np.full((n, GRID), 0.5), np.zeros((n, GRID))
        self._stakes, self._run = np.zeros((n, GRID, len(RISES))), np.zeros((n, GRID, len(RISES)))
        self._before = np.zeros(n)  # the mean in the reference, of a rank that of the number
        # By number and rise, the bets since they last won nothing (Page's CUSUM): when that was, how many came, and
        # their sums; of a rank also of the ranks.
        self._won, self._since = np.ones((n, len(RISES))), np.zeros((n, len(RISES)))
        self._count, self._sums, self._rank_sums = (np.zeros((n, len(RISES))) for _ in range(3))
        self._sorted: dict[int, array[float]] = {}
        # The numbers' evidence, None until one looks.
        self._least: Floats | None = None

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
        evidence = float(self._evidence() @ self._weights)
        return math.log(evidence) if evidence > 0 else -math.inf

    def update(self, values: Mapping[str, float | None], now: float) -> None:
        """Take in one unit; what is missing, or None, is left out."""
        x, raw = np.zeros((2, len(self.kinds), 1))
        seen = np.zeros_like(x)
        for i, (name, kind) in enumerate(self.kinds.items()):
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            if not self._ready[i]:
                self._gather(i, value)
                continue
            seen[i], raw[i] = 1, value
            x[i] = value if kind is Kind.SHARE else self._rank(i, value, kind)
        if not seen.any():
            return
        # What is missing multiplies by 1 and adds 0.
        factors = 1 + self._stakes * ((x - self._shares) * seen)[..., None]
        self._run += seen[..., None]
        self._run *= factors
        self._least = None
        self._won *= factors[:, 0]
        self._count += seen
        self._sums += raw
        self._rank_sums += x
        # What came so far speaks against a change: it began later.
        quiet = self._won <= 1
        np.putmask(self._since, quiet, now)
        np.putmask(self._won, quiet, 1)
        for kept in (self._count, self._sums, self._rank_sums):
            np.putmask(kept, quiet, 0)

    def moved(self, log_threshold: float) -> list[Moved]:
        """Numbers whose own part of the evidence is beyond the threshold, by as much as matters; the strongest
        first."""
        evidence, least = self._evidence() * self._weights, math.exp(min(log_threshold, 700.0))
        if np.maximum.reduce(evidence) < least:
            return []
        moved, kinds = [], list(self.kinds.items())
        for i in np.flatnonzero(evidence >= least).tolist():
            (name, kind), best = kinds[i], (i, int(self._won[i].argmax()))
            count = int(self._count[best])
            if not count:
                continue
            before, now = float(self._before[i]), float(self._sums[best] / count)
            if kind is Kind.SHARE:
                matters = now - before >= LEAST["share"]
            else:
                matters = float(self._rank_sums[best] / count) - 0.5 >= LEAST["rank"]
            if matters:
                moved.append(Moved(name, before, now, float(self._since[best]), count, math.log(evidence[i])))
        return sorted(moved, key=lambda each: -each.log_evidence)

    def reset(self) -> None:
        """An alarm has been dealt with: the evidence begins again at nothing, the reference stays."""
        self._run[:], self._least = 0, None
        self._won[:] = 1
        for kept in (self._count, self._sums, self._rank_sums):
            kept[:] = 0

    def begin(self, name: str, values: Floats) -> None:
        """Make these the reference of one number."""
        i = list(self.kinds).index(name)
        self._gathered[i] = [float(value) for value in values]
        self._freeze(i)

    def _evidence(self) -> Floats:
        """(numbers,): the least of the grid's, 0 while a number has no reference."""
        if self._least is None:
            self._least = (self._run @ BET_WEIGHTS * self._against).min(axis=1)
        return self._least

    def _rank(self, i: int, value: float, kind: Kind) -> float:
        """The middle of those that are equal."""
        reference = self._sorted[i]
        rank = (bisect_left(reference, value) + bisect_right(reference, value)) / (2 * len(reference))
        return rank if kind is Kind.RANK else 1 - rank

    def _gather(self, i: int, value: float) -> None:
        self._gathered[i].append(value)
        if len(self._gathered[i]) >= self.needed:
            self._freeze(i)

    def _freeze(self, i: int) -> None:
        values, kind = np.array(self._gathered[i]), list(self.kinds.values())[i]
        self._gathered[i] = []
        self._before[i] = values.mean()
        n = len(values)
        if kind is Kind.SHARE:
            # Laplace's estimate: a share of which nothing was seen has an error too.
            share = (values.sum() + 1) / (n + 2)
            error = math.sqrt(share * (1 - share) / n)
            shares = share + np.linspace(0, FARTHEST, GRID) * error
            against = _against(values, np.minimum(shares, _SAFE))
            rises = RISES
        else:
            self._sorted[i] = array("d", np.sort(values).tobytes())
            values = np.array([self._rank(i, value, kind) for value in values])
            shares, against = np.full(GRID, 0.5 + SURE / math.sqrt(12 * n)), np.ones(GRID)
            rises = RANK_RISES
        shares = np.minimum(shares + _wander(values), _SAFE)
        self._shares[i], self._against[i] = shares, against
        # As the ratio of likelihoods of a share that is higher by the rise; no rank is 0 or 1 alone.
        spread = shares * (1 - shares) if kind is Kind.SHARE else np.full(GRID, 1 / 12)
        stakes = np.minimum(shares[:, None] + rises, 1) - shares[:, None]
        self._stakes[i] = np.minimum(stakes / spread[:, None], _SAFE / shares[:, None])
        self._ready[i], self._least = True, None

    def state(self) -> dict[str, NDArray]:
        """All of it as arrays."""
        gathered = [np.array(values, np.float64) for values in self._gathered]
        sizes = np.array([len(values) for values in gathered])
        state = {name: getattr(self, f"_{name}").copy() for name in _KEPT}
        state |= {"names": np.array(list(self.kinds), "U32"), "needed": np.array(self.needed), "sizes": sizes}
        state["gathered"] = np.concatenate(gathered) if gathered else np.zeros(0)
        return state | {f"sorted.{list(self.kinds)[i]}": np.array(values) for i, values in self._sorted.items()}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where the one was whose `state()` this is. Nothing of one with other numbers: they begin anew."""
        if not state or state["names"].tolist() != list(self.kinds):
            return
        self.needed, self._least = int(state["needed"]), None
        for name in _KEPT:
            kept = getattr(self, f"_{name}")
            kept[...] = own(kept.shape, state[name], kept.dtype)
        gathered = np.split(state["gathered"], np.cumsum(state["sizes"])[:-1])
        self._gathered = [values.tolist() for values in gathered]
        self._sorted = {
            i: array("d", state[f"sorted.{name}"].tolist())
            for i, name in enumerate(self.kinds)
            if f"sorted.{name}" in state
        }


_KEPT = ("ready", "shares", "against", "stakes", "run", "before", "won", "since", "count", "sums", "rank_sums")
# Of a share p, which lower ones are bet on with the reference, as parts of p; and the part of the capital that is not.
_LOWER = np.array((0.97, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2))
_ASIDE = 0.1


def _against(values: Floats, shares: Floats) -> Floats:
    """(shares,): how much the reference speaks against each, an e-value of it."""
    stakes = _LOWER * shares[:, None] - shares[:, None]
    stakes /= (shares * (1 - shares))[:, None]
    # Numbers that are equal are many.
    levels, counts = np.unique(values, return_counts=True)
    factors = 1 + stakes[..., None] * (levels - shares[:, None])[:, None, :]
    capitals = np.exp(np.minimum((np.log(factors) * counts).sum(axis=-1), 700.0))
    against: Floats = _ASIDE + (1 - _ASIDE) * capitals.mean(axis=-1)
    return against


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
