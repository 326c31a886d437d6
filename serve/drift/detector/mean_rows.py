"""Directions in which the mean rows of prompts leave the reference: hundreds of numbers, which tell close genres apart.

    means = MeanRows(needed=1000, seed=7)
    for _ in means.steps(rows, nows): ...   # the first `needed` become the reference; later ones are ranked, then teach
    means.evidence()                        # half of the evidence of `serve.drift.detector.detector`

A genre differs from another a little in many numbers, so that none of them raises an alarm: their sum does (Hotelling,
Annals of Mathematical Statistics 2, 1931). The rows are whitened by the reference, which is also the bag that they are
ranked in. Two directions are the exponentially weighted sums of the rows since, less the mean of the reference. Then
each row counts by how probably it is foreign, as far as it lies along them, and the sums are taken once more: one step
of expectation maximization (Dempster, Laird and Rubin, Journal of the Royal Statistical Society B 39, 1977), which
takes out most of the noise of the usual rows in a mixture. A row is ranked in the bag along the directions, then
teaches them and is in the bag itself: they depend on earlier rows alone.

A row of the bag lies where it does also for what it did to the direction itself. A live one lies farther along it,
because it taught; one of the reference less far, because it is in the mean that is taken off and in the covariance (its
leverage; Sherman and Morrison, Annals of Mathematical Statistics 21, 1950). Both are made up for (leave one out), so
that a new row is compared with where the others would lie if they were new. Only rising bets are placed.
`tests/serve/drift/detector/test_mean_rows.py` measures what remains.

Behind the mean of its tokens a row has the scores of how surprising they are (`with_surprise`): a close genre moves
them too, and they explain a part of what the other numbers differ by among usual requests.

A number of a row is kept in eight bits. Rows are in memory alone: of a few hundred numbers the words of a short prompt
could be made out. After a restart the first `needed` rows are the reference anew, and the evidence goes on.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from serve.drift.detector.bets import MANY_BETS, Floats, Runs, State, cells
from serve.drift.detector.reference_structure import autocorrelation_time, wandering

HALF_LIVES = (64.0, 256.0)  # in requests
_LOG_FADES = np.array([[math.log(0.5) / half_life] for half_life in HALF_LIVES], np.float32)
# Share of the mean variance that is added to every direction before whitening.
RIDGE = 1.0
# Directions turn after so many rows. Where the reference lies along new ones is taken from every so many of its rows.
TURN, EVERY = 32, 4
# What foreign rows are taken for: so many standard deviations farther along a direction, and so many of all.
FARTHER, SHARE = 1.5, 0.2
# How much of its own covariance a row may be.
MOST_LEVERAGE = 0.9
# A row teaches up to this length, in root mean squares of the reference's lengths.
FARTHEST = 1.5
# Projections that differ by less are equal.
SAME = 2e-5
# What a surprise of unit spread is multiplied by. The numbers of a mean row spread by some 2.5, whatever the model: so
# whitening, with its ridge, leaves a surprise its whole weight.
SURPRISE = 10.0
# Of the spread of a number in the reference: rows are kept in eight bits a number.
STEPS = 20
# Probability that an exchangeable reference is said to change slowly.
ALPHA = 2e-2
# With fewer rows nothing is said: a covariance of hundreds of numbers needs some.
FEWEST = 200


def with_surprise(means: NDArray[np.float32], scores: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """A copy of mean rows (..., width) with the surprises (..., 2) of the same requests behind them, if any."""
    return means.copy() if scores is None else np.concatenate((means, np.float32(SURPRISE) * scores), axis=-1)


class Phase(Enum):
    GATHERING = "gathering"
    RANKING = "ranking"
    OFF = "off"  # of this reference nothing follows


class MeanRows:
    """needed: rows of the reference; the bag holds as many. ordered: they come in the order of time."""

    def __init__(self, needed: int, seed: int = 0, ordered: bool = True) -> None:
        self._needed = needed
        self._seed = seed
        self._ordered = ordered
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._gathered: list[NDArray[np.float32]] = []
        self._runs = Runs(len(HALF_LIVES) * MANY_BETS.shape[1])
        # Where the reference lies along the directions, sorted, and where the bag does; None since they turned last.
        self._known = np.zeros((len(HALF_LIVES), 1), np.float32)
        self._sorted: list[array[float]] | None = None
        self.phase = Phase.GATHERING
        # The reference changes slowly.
        self.wanders = False

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.float32]], seed: int = 0, ordered: bool = True) -> Self:
        """With these rows as its reference."""
        self = cls(len(rows), seed, ordered)
        self._gathered = list(rows)
        self._begin()
        return self

    def steps(self, rows: NDArray[np.float32], nows: Sequence[int]) -> Iterator[Floats | float]:
        """Take the mean rows (n, width) of the `nows`th requests, to be run to its end: many at once cost less.
        (directions,) where each lies in the reference, from 0 to 1; a half while there is none.

        Until the directions turn, where a row lies along them says nothing about another: those are ranked at once.
        """
        at = 0
        while at < len(rows):
            if self.phase is Phase.RANKING:
                ranked = rows[at : at + TURN - self._waiting]
                small = self._small(ranked)
                in_reference = self._reference_ranks(small)
                bets = MANY_BETS.take(cells(self._ranks(small)), axis=0).reshape(len(ranked), -1)
                at += len(ranked)
                for place, _ in enumerate(self._runs.steps(bets, nows[at - len(ranked) : at]), 1):
                    if place == len(ranked) and self._waiting >= TURN:
                        self._turn()
                    yield in_reference[place - 1]
                continue
            if self.phase is Phase.GATHERING:
                self._gathered.append(rows[at])
                if len(self._gathered) >= self._needed:
                    self._begin()
            at += 1
            yield 0.5

    def evidence(self) -> float:
        """The mean of all R."""
        return float(np.add.reduce(self._runs.r)) / len(self._runs.r)

    def began(self) -> tuple[float, int]:
        """Page's statistic of the strongest bet, and the request after which its run began."""
        return self._runs.began()

    def reset(self, now: int) -> None:
        """Begin again at no evidence; what was learned stays."""
        self._runs.reset(now)

    def state(self) -> State:
        """The evidence alone: no row."""
        settings = np.array([self._needed, self._seed, self.phase is Phase.OFF])
        runs = {name: kept.reshape(len(HALF_LIVES), -1) for name, kept in self._runs.state().items()}
        return {"settings": settings} | runs

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Self:
        """What gathers a reference anew, with the evidence of this `state()`."""
        needed, seed, off = (int(number) for number in state["settings"])
        self = cls(needed, seed)
        self.phase = Phase.OFF if off else Phase.GATHERING
        self._runs.restore(state)
        return self

    def _begin(self) -> None:
        """The rows that were gathered are the reference, unless time made them unlike."""
        rows = np.array(self._gathered, np.float32)
        self._gathered = []
        # Equal rows differ by roundings, which are not to be looked at.
        equal = rows.var(axis=0).sum() <= 1e-6 * (rows**2).mean(axis=0).sum()
        said = len(rows) >= FEWEST and not equal
        self.wanders = said and self._ordered and bool(wandering(rows, self._rng, ALPHA).any())
        if not said or self.wanders or (self._ordered and autocorrelation_time(rows) > 1):
            self.phase = Phase.OFF
            self._runs = Runs(len(self._runs.r))
            return
        self._centre = rows.mean(axis=0)
        self._step = np.maximum(rows.std(axis=0), 1e-9) / STEPS
        self._reference = self._small(rows)
        units = self._reference * self._step
        self._whiten = self._step[:, None] * _whitening(units)
        whitened = self._reference @ self._whiten
        n, width = whitened.shape
        self._size, self._capacity = n, 2 * n
        self._bag = np.zeros((self._capacity + 1, width), np.int8)
        self._bag[:n] = self._reference
        self._farthest = FARTHEST * np.sqrt((whitened**2).sum() / n)
        # When each row of the bag came, and the share of it that teaches; none of the reference. The leverage of that.
        self._times = np.zeros(self._capacity + 1)
        self._teaching = np.zeros(self._capacity + 1, np.float32)
        self._leverage = np.zeros(self._capacity + 1, np.float32)
        leverage = np.add.reduce(whitened**2, axis=1) / n
        self._known_leverage = np.minimum(leverage, MOST_LEVERAGE).astype(np.float32)
        self._leverage[:n] = self._known_leverage
        # What each would move the directions towards itself by.
        self._pull = np.zeros(self._capacity + 1, np.float32)
        self._along = np.zeros((len(HALF_LIVES), self._capacity + 1), np.float32)
        self._mean_part = np.zeros((len(HALF_LIVES), 1), np.float32)
        self._onto = np.zeros((len(HALF_LIVES), width), np.float32)
        # Rows that do not teach yet, and their places in the bag.
        self._waiting_rows = np.zeros((TURN, width), np.int8)
        self._waiting_places = np.zeros(TURN, np.int64)
        self._waiting = self._ranked = 0
        self.phase = Phase.RANKING

    def _ranks(self, rows: NDArray[np.int8]) -> NDArray[np.float64]:
        """(n, directions) smoothed conformal p-values in the bag, which takes the rows (n, width) in one by one."""
        if self._sorted is None:
            self._sorted = [array("f", np.sort(line[: self._size]).tobytes()) for line in self._along]
        owns, p = self._own(rows), []
        for row, own, least, most in zip(rows, owns, (owns - SAME).tolist(), (owns + SAME).tolist(), strict=True):
            m, ties = self._size, self._rng.random(len(own)).tolist()
            less, upto = map(bisect_left, self._sorted, least), map(bisect_right, self._sorted, most)
            p.append(
                [(low + tie * (high - low + 1)) / (m + 1) for low, tie, high in zip(less, ties, upto, strict=True)]
            )
            # At random among all m + 1, the new one included, as in the scores' bags.
            place = m if m < self._capacity else int(self._rng.integers(m + 1))
            if place < self._capacity:
                self._replace(place, own.tolist())
            self._along[:, place] = own
            self._waiting_rows[self._waiting], self._waiting_places[self._waiting] = row, place
            self._waiting += 1
        return np.array(p)

    def _reference_ranks(self, rows: NDArray[np.int8]) -> Floats:
        """(n, directions): where rows (n, width) lie in the reference, ties in their middle."""
        pairs = list(zip(self._known, self._own(rows).T, strict=True))
        places = [known.searchsorted(own - SAME) + known.searchsorted(own + SAME, "right") for known, own in pairs]
        return np.array(places).T / (2 * self._known.shape[1])

    def _own(self, rows: NDArray[np.int8]) -> NDArray[np.float32]:
        """(n, directions): where rows (n, width) lie. One by one: a product of many may round otherwise."""
        return np.array([self._onto @ row for row in rows.astype(np.float32)])

    def _replace(self, place: int, own: Sequence[float]) -> None:
        """Of the sorted bag the entry at `place`, if there is one already, by a row's `own`."""
        assert self._sorted is not None
        for line, old, new in zip(self._sorted, self._along[:, place].tolist(), own, strict=True):
            if place < self._size:
                del line[bisect_left(line, old)]
            insort(line, new)
        self._size = max(self._size, place + 1)

    def _turn(self) -> None:
        """Learn from the rows that wait, and rank along what was learned."""
        places, rows = self._waiting_places[: self._waiting], self._waiting_rows[: self._waiting]
        self._waiting = 0
        squares = np.add.reduce((rows @ self._whiten) ** 2, axis=1)
        # Of two rows in one place the later one stays.
        self._bag[places] = rows
        self._times[places] = np.arange(self._ranked, self._ranked + len(rows))
        self._teaching[places] = np.minimum(self._farthest / np.maximum(np.sqrt(squares), 1e-12), 1)
        self._pull[places] = self._teaching[places] * squares
        self._leverage[places] = 0
        self._ranked += len(rows)
        m = self._size
        ages = (self._ranked - 1 - self._times[:m]).astype(np.float32)
        weights = np.exp(_LOG_FADES * ages)  # (directions, m)
        bag = self._bag[:m].astype(np.float32)
        self._sorted = None
        self._learn(weights, bag)
        known = self._reference_along()
        centre, spread = known.mean(axis=1, keepdims=True), np.maximum(known.std(axis=1, keepdims=True), 1e-12)
        farther = FARTHER * (self._along[:, :m] - centre) / spread - FARTHER**2 / 2
        odds = SHARE / (1 - SHARE) * np.exp(np.minimum(farther, 20))
        self._learn(weights * odds / (1 + odds), bag)
        self._known = np.sort(self._reference_along(), axis=1)

    def _learn(self, weights: NDArray[np.float32], bag: NDArray[np.float32]) -> None:
        """Directions of what the rows of the bag teach by `weights`, (directions, m), and where the rows lie along
        them."""
        m, leverage = self._size, self._leverage[: self._size]
        taught = weights * self._teaching[:m]
        # Of two rows and a bag one by one: together they would be copied first, which takes twice as long.
        learned = np.array([row @ bag for row in taught]) @ self._whiten
        length = np.maximum(np.sqrt(np.add.reduce(learned**2, axis=1, keepdims=True)), 1e-12)
        self._onto[:] = learned / length @ self._whiten.T
        self._mean_part[:] = np.add.reduce(taught, axis=1, keepdims=True) / length
        own = weights * self._pull[:m] / length
        self._along[:, :m] = (_along(bag, self._onto).T - own + self._mean_part * leverage) / (1 - leverage)

    def _reference_along(self) -> NDArray[np.float32]:
        """(directions, n): where some of the reference lies, every so many of its rows."""
        leverage, rows = self._known_leverage[::EVERY], self._reference[::EVERY].astype(np.float32)
        along: NDArray[np.float32] = (_along(rows, self._onto).T + self._mean_part * leverage) / (1 - leverage)
        return np.ascontiguousarray(along)

    def _small(self, rows: NDArray[np.float32]) -> NDArray[np.int8]:
        """Numbers of eight bits: less the centre, in steps of their spread in the reference."""
        return np.clip(np.rint((rows - self._centre) / self._step), -127, 127).astype(np.int8)


def _along(rows: NDArray[np.float32], onto: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, directions): where rows (n, width) lie along directions, taken one by one as in `_learn`."""
    return np.array([rows @ direction for direction in onto]).T


def _whitening(centred: NDArray[np.float32]) -> NDArray[np.float32]:
    """(width, width), of rows around the centre."""
    covariance = centred.T @ centred / len(centred)
    covariance += (RIDGE * np.trace(covariance) / len(covariance) + 1e-9) * np.eye(len(covariance), dtype=np.float32)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    return np.ascontiguousarray(vectors / np.sqrt(np.maximum(values, 1e-12)), np.float32)
