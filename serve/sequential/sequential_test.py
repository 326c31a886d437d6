"""Is the new version worse than the old one? Both answer at the same time; each block of requests is an experiment.

    comparison = Comparison(weight=0.1, alpha=0.01, seed=7)
    comparison.observe(True, {"inter_token": 0.021, "error": 0.0}, asker=key)      # one finished request of the canary
    comparison.verdict                                                            # UNDECIDED, WORSE or PROVED

Load and users wander through the day, so before is never held against after. Requests are cut into disjoint blocks in
the order in which they end. Under "the version makes no difference" which of a block's requests went to the canary is a
matter of chance, whatever the load did meanwhile: so the ranks of the canary's requests within the block are a random
draw, and exp(l * sum of their ranks) over its mean over all draws is a bet with mean 1; of errors and the like, the
sum of ones. The products over blocks are martingales; their mean W over strengths l is one too, and by Ville's
inequality P(W >= 1 / a, ever) <= a.

Each check gets its share of alpha, so P(WORSE, ever) <= alpha while the canary is no worse than the live version by
more than each check's tolerance. A tolerance is taken off the canary's values before they are ranked. Of a rate that
would take twice the requests: it has to be worse at all at its share a of alpha, and worse than the tolerance at the
square root of a. So P(WORSE, ever) <= a where it is no worse, and at most that root where it is, within the tolerance.

PROVED turns the question round: for every required check, the hypothesis "worse by more than the tolerance" was
refuted at alpha. If any of them is true, P(PROVED, ever) <= alpha. It does not say that the new version is better.
Grades are required once FEW of either version are there; "worse by `proof`" is refuted by bets on the difference of
means within a block (`sequential.betting`). Until then they must not show it.

The effect is what the ranks are about: the median of the differences between the two versions' requests within a block
(Hodges and Lehmann, 1963). A check is WORSE only while its effect is beyond the tolerance, and proved only while it is
not. Grades are bet on twice, half of the capital each: on their ranks, and each as the chance of a 1, as thumbs nearly
all have the same rank. Whoever grades may do so because of what he got. A canary whose unhappy askers grade more often
has as many good grades a request as the live version: WORSE takes fewer, at RESPONSE whenever one looks (a mixture of
normal bounds; Waudby-Smith et al., Time-uniform central limit theory, 2024). A proof stands without its best grades.

The router draws: a canary is chosen by asker, so each asker may be counted once only; pass `asker`. Where it draws for
each request, each has a name of its own there, or none.
Neither clock nor files; a comparison restored from its state goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import product
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.sequential.betting import BETS
from serve.sequential.proof_forecast import PROVED, Forecast, ProofGrowth, latest
from serve.sequential.random_state import rng_from, rng_state

State: TypeAlias = dict[str, NDArray]

# Strengths of the bets: the weak find small differences late, the strong ones large differences at once.
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
# The same of a rate: ln of odds ratios, and what each weighs at first. Small differences take longest to be seen.
ODDS = (0.5, 0.75, 1.0, 2.0, 4.0)
ODDS_WEIGHTS = (0.25, 0.35, 0.2, 0.12, 0.08)
# Of a rate blocks are longer: in short ones there is often no 1 to draw, or nobody who draws it.
RATE_BLOCKS = 2
# What "worse than the tolerance" takes, in parts of the evidence (ln) that "worse at all" takes: of a rate.
SOME = 0.5
# Grades of either version from which on they are a part of the proof.
FEW = 20
# What is said of grades whose difference decides nothing.
UNEQUAL = "the canary's askers rate {:.2f} times as often as the others: that alone may explain the difference"
# Probability that a canary is called worse only because its unhappy askers rate more often; and the precision (one over
# the squared relative error) from which on this bound, a mixture of normal ones, is near its tightest.
RESPONSE, RESPONSE_FROM = 0.1, 20.0
# Askers that are remembered.
ASKERS = 50_000


class Verdict(Enum):
    UNDECIDED = "undecided"
    WORSE = "worse"
    PROVED = "proved"


class Worse(Enum):
    """Which way is bad."""

    HIGHER = "higher"
    LOWER = "lower"
    EITHER = "either"


class Unit(Enum):
    RATIO = "ratio"  # positive values; a tolerance of 0.05 is 5 %
    DIFFERENCE = "difference"  # a tolerance in the values' own unit
    RATE = "rate"  # 0 or 1; a tolerance of 0.02 is two more of a hundred that would have been 0
    GRADE = "grade"  # from 0 to 1, by those who like to


@dataclass(frozen=True, slots=True)
class Check:
    """One number of each request. `share`: of alpha, in proportion to the others'. `required`: for PROVED. `proof`: of
    grades, by how much worse must be refuted for it."""

    name: str
    group: str
    worse: Worse
    unit: Unit
    tolerance: float
    required: bool = False
    share: float = 1.0
    proof: float = 0.1

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.share <= 0 or (self.unit is Unit.RATE and self.tolerance >= 1):
            raise ValueError(
                f"check {self.name} has tolerance {self.tolerance} and share {self.share}; a tolerance is 0 or more "
                "(of a rate below 1), a share above 0"
            )


LATENCY, QUALITY, ERRORS, FEEDBACK = GROUPS = ("latency", "quality", "errors", "feedback")

CHECKS = (
    Check("inter_token", LATENCY, Worse.HIGHER, Unit.RATIO, 0.05, required=True, share=2),
    Check("first_token", LATENCY, Worse.HIGHER, Unit.RATIO, 0.10, required=True),
    Check("error", ERRORS, Worse.HIGHER, Unit.RATE, 0.02, required=True),
    Check("mean_logprob", QUALITY, Worse.EITHER, Unit.DIFFERENCE, 0.15, share=2),
    Check("length", QUALITY, Worse.EITHER, Unit.RATIO, 0.5),
    Check("ended_by_length", QUALITY, Worse.HIGHER, Unit.RATE, 0.10, required=True),
    Check("refusal", QUALITY, Worse.HIGHER, Unit.RATE, 0.05, required=True),
    Check("rating", FEEDBACK, Worse.LOWER, Unit.GRADE, 0.0),
)
# Of a version that is meant to answer otherwise: what differs without being bad is no reason against it.
HARM_CHECKS = tuple(check for check in CHECKS if check.worse is not Worse.EITHER)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check so far. Evidence is ln, and is held against `Comparison.log_threshold`; alpha's share is in it
    already."""

    name: str
    group: str
    log_evidence: float
    log_proof: float
    canary: int
    live: int
    effect: float  # canary against live: ratio or difference, of rates and grades of means; nan while one has none
    worse: bool
    proved: bool
    # Requests of both versions until it is proved; None for a check that is not required, and at the beginning.
    to_proof: Forecast | None = None
    # Why evidence is no verdict.
    note: str = ""


class Comparison:
    """Canary against live on `checks`. Not thread-safe. weight: the canary's share of requests, from 0 to 1.

    alpha: probability of a false WORSE, ever, over all checks together, and of a false PROVED.
    """

    def __init__(self, weight: float, *, checks: Sequence[Check] = CHECKS, alpha: float = 0.01, seed: int = 0) -> None:
        if not 0 < weight < 1:
            raise ValueError(f"weight {weight} leaves one version without requests; it lies between 0 and 1")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha {alpha} is no probability of a false alarm; 0.01 is usual")
        if not checks or len({check.name for check in checks}) != len(checks):
            raise ValueError("checks need a name each that no other has, and there is at least one")
        self.weight = weight
        self.alpha = alpha
        self.checks = tuple(checks)
        # Requests that a verdict may rest on, and what was left out because its asker had been counted already.
        self.requests = self.skipped = 0
        whole = sum(check.share for check in checks)
        self._tests = [_CheckTest(check, _block(weight, check.unit), check.share / whole) for check in checks]
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._askers: OrderedDict[int, None] = OrderedDict()
        self._verdict = Verdict.UNDECIDED

    def observe(self, canary: bool, values: Mapping[str, float | None], *, asker: Hashable | None = None) -> Verdict:
        """One finished request and what it gave to the checks; what is missing, None or not finite is left out.

        One that gave nothing does not count as its asker's.
        """
        if not values:
            return self.verdict
        self.requests += any(check.required and check.name in values for check in self.checks)
        if asker is not None and self._counted(asker):
            self.skipped += 1
            return self.verdict
        closed = False
        for test in self._tests:
            value = values.get(test.check.name)
            if value is not None and math.isfinite(value):
                test.exposure = self._exposure()
                closed = test.observe(canary, float(value), self._rng) or closed
        return self._decide() if closed else self.verdict

    @property
    def verdict(self) -> Verdict:
        """Does not change any more once it is WORSE or PROVED."""
        return self._verdict

    @property
    def log_threshold(self) -> float:
        return -math.log(self.alpha)

    def log_evidence(self, group: str | None = None) -> float:
        """The strongest evidence for WORSE in a group, or in all; >= log_threshold at some time means WORSE."""
        evidence = [test.log_evidence() for test in self._tests if group in (None, test.check.group)]
        return max(evidence, default=-math.inf)

    def results(self) -> list[CheckResult]:
        """Every check, in order."""
        return [test.result(self.log_threshold, self.requests) for test in self._tests]

    def to_proof(self) -> Forecast | None:
        """Further requests of both versions until PROVED; None while that cannot be told yet."""
        if self._verdict is Verdict.PROVED:
            return PROVED
        return latest(
            result.to_proof for test, result in zip(self._tests, self.results(), strict=True) if test.required
        )

    def reasons(self) -> list[CheckResult]:
        """What made it WORSE."""
        return [result for result in self.results() if result.worse]

    def set_weight(self, weight: float) -> None:
        """The share has changed: open blocks are thrown away, since their requests were drawn at two different odds."""
        if not 0 < weight < 1:
            raise ValueError(f"weight {weight} leaves one version without requests; it lies between 0 and 1")
        self.weight = weight
        for test in self._tests:
            test.restart(_block(weight, test.check.unit))

    def state(self) -> State:
        states = [test.state().items() for test in self._tests]
        state = {f"{i}.{name}": value for i, items in enumerate(states) for name, value in items}
        return state | {
            "checks": np.array([test.check.name for test in self._tests]),
            "odds": np.array([self.weight, self.alpha]),
            "skipped": np.array(self.skipped),
            "requests": np.array(self.requests),
            "askers": np.array(list(self._askers), np.int64),
            "verdict": np.array(self._verdict.value),
            "lots": rng_state(self._rng),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray], checks: Sequence[Check] = CHECKS) -> Self:
        """The comparison whose `state()` this was, over the same checks; ValueError if it was over others."""
        if [str(name) for name in state["checks"]] != [check.name for check in checks]:
            raise ValueError("the saved comparison was over other checks; begin a new one")
        weight, alpha = (float(odds) for odds in state["odds"])
        self = cls(weight, checks=checks, alpha=alpha)
        for i, test in enumerate(self._tests):
            test.restore({name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{i}.")})
        self.skipped = int(state["skipped"])
        # Earlier releases did not count them.
        counted = max(int(test.counts.sum()) for test in self._tests)
        self.requests = int(state.get("requests", self.skipped + counted))
        self._askers = OrderedDict.fromkeys(int(asker) for asker in state["askers"])
        self._verdict = Verdict(str(state["verdict"]))
        self._rng = rng_from(state["lots"])
        return self

    def _counted(self, asker: Hashable) -> bool:
        key = _key(asker)
        known = key in self._askers
        self._askers[key] = None
        self._askers.move_to_end(key)
        if len(self._askers) > ASKERS:
            self._askers.popitem(last=False)
        return known

    def _decide(self) -> Verdict:
        if self._verdict is Verdict.UNDECIDED:
            results = self.results()
            required = [result.proved for test, result in zip(self._tests, results, strict=True) if test.required]
            if any(result.worse for result in results):
                self._verdict = Verdict.WORSE
            elif required and all(required) and not any(test.speaks_against for test in self._tests):
                self._verdict = Verdict.PROVED
        return self._verdict

    def _exposure(self) -> tuple[int, int]:
        """How many requests of live and canary could have been graded."""
        live, canary = max((test.counts.tolist() for test in self._tests if test.check.required), default=(0, 0))
        return live, canary


class _CheckTest:
    """One check's blocks and wealth. Sides: 0, is the canary too high; 1, is it too low."""

    def __init__(self, check: Check, block: int, share: float) -> None:
        self.check = check
        self._block, self._share = block, share
        self._sides = {Worse.HIGHER: (0,), Worse.LOWER: (1,), Worse.EITHER: (0, 1)}[check.worse]
        self._open: list[tuple[bool, float]] = []
        # ln wealth by side and strength, of "worse than the tolerance" and of "not worse than that"
        by_odds, by_strength = np.log(np.array(ODDS_WEIGHTS) * len(ODDS)), np.zeros(len(STRENGTHS))
        self._bad, self._good = np.tile(by_odds if check.unit is Unit.RATE else by_strength, (2, 2, 1))
        # The same of "worse at all", of a rate; of grades, by their mean, where `_bad` is by their ranks.
        self._unlike = np.tile(by_odds, (2, 1))
        self._most = np.zeros((2, 2))  # the highest that either has been, by side
        self.counts = np.zeros(2, np.int64)  # live, canary
        self._sums = np.zeros(2)
        # Of the shifts within blocks, the sum and that of their weights.
        self._shifts = np.zeros(2)
        # Requests of live and canary that might have given a value, 0 where that is not known.
        self.exposure = (0, 0)
        # Of the proofs, in order of `_sides`.
        self._growth = [ProofGrowth(len(STRENGTHS)) for _ in self._sides]

    def observe(self, canary: bool, value: float, rng: np.random.Generator) -> bool:
        """Whether this request filled its block."""
        if self.check.unit is Unit.RATIO and value <= 0:
            return False
        self.counts[int(canary)] += 1
        self._sums[int(canary)] += math.log(value) if self.check.unit is Unit.RATIO else value
        self._open.append((canary, value))
        if len(self._open) < self._block:
            return False
        self._close(rng)
        return True

    def log_evidence(self) -> float:
        """Of "worse", now, with the share of alpha taken off."""
        sides = [_log_mean(self._bad[side]) for side in self._sides]
        unlike = [_log_mean(self._unlike[side]) for side in self._sides]
        if self.check.unit is Unit.RATE:
            sides = [min(at_all, max(beyond, beyond / SOME)) for at_all, beyond in zip(unlike, sides, strict=True)]
        if self.check.unit is Unit.GRADE:
            sides = [_log_mean(np.array(both)) for both in zip(unlike, sides, strict=True)]
        return _log_mean(np.array(sides)) + math.log(self._share)

    def log_proof(self) -> float:
        """Of "within the tolerance" on every side; no share, since all required checks must be proved together."""
        return min(_log_mean(self._good[side]) for side in self._sides)

    def result(self, log_threshold: float, requests: int) -> CheckResult:
        """As of now, after so many requests in all."""
        live, canary = (int(count) for count in self.counts)
        worse = float(self._most[0, 0]) >= log_threshold
        by_response = not worse and self.check.unit is Unit.GRADE and self.log_evidence() >= log_threshold
        proved = min(float(self._most[1, side]) for side in self._sides) >= log_threshold
        return CheckResult(
            self.check.name,
            self.check.group,
            self.log_evidence(),
            self.log_proof(),
            canary,
            live,
            self._effect(),
            worse=worse,
            proved=proved,
            to_proof=self._to_proof(log_threshold, requests, proved) if self.required else None,
            note=UNEQUAL.format(self._response()) if by_response else "",
        )

    @property
    def required(self) -> bool:
        """PROVED takes a proof of it."""
        return self.check.required or (self.check.unit is Unit.GRADE and int(self.counts.min()) >= FEW)

    @property
    def speaks_against(self) -> bool:
        """There are too few grades for a proof, and they show what it would have to refute."""
        graded = self.check.unit is Unit.GRADE and self.counts.min() > 0 and not self.required
        return graded and self._effect() < -self.check.proof

    def _effect(self) -> float:
        live, canary = self.counts.tolist()
        if not (live and canary):
            return math.nan
        effect = float(self._sums[1] / canary - self._sums[0] / live)
        if self._shifts[1]:
            effect = float(self._shifts[0] / self._shifts[1])
        return math.exp(effect) if self.check.unit is Unit.RATIO else effect

    def _beyond(self, side: int, *, for_proof: bool = False) -> bool:
        """The effect is beyond the tolerance on this side."""
        effect, tolerance = self._effect(), self.check.tolerance
        live, canary = (self._sums / np.maximum(self.counts, 1)).tolist()
        if math.isnan(effect):
            return False
        if self.check.unit is Unit.RATIO:
            return effect > 1 + tolerance if side == 0 else effect < 1 / (1 + tolerance)
        if self.check.unit is Unit.RATE:
            higher, lower = (canary, live) if side == 0 else (live, canary)
            return bool(higher > lower + tolerance * (1 - lower))
        if self.check.unit is Unit.GRADE and not for_proof:
            return canary < live and self._good_a_request() < 0
        if self.check.unit is Unit.GRADE:
            times = max(self._response() * math.exp(2 * self._response_error()), 1.0)
            return 1 - (1 - canary) * times < live - self.check.proof
        return effect > tolerance if side == 0 else effect < -tolerance

    def _response(self) -> float:
        """How many times as often the canary's requests are graded as the live version's; 1 where it is not known."""
        seen, graded = np.array(self.exposure), self.counts
        if not (seen.all() and graded.all()):
            return 1.0
        return float(graded[1] / seen[1] / (graded[0] / seen[0]))

    def _response_error(self) -> float:
        """Standard error of its logarithm."""
        seen, graded = np.array(self.exposure), self.counts
        return math.sqrt(float((1 / graded - 1 / np.maximum(seen, graded)).sum())) if seen.all() and graded.all() else 0

    def _good_a_request(self) -> float:
        """By how much the canary has more good grades a request than the live version, at most, whenever one looks
        (RESPONSE); minus infinity where nothing is known of requests."""
        seen = np.maximum(self.exposure, self.counts)
        if not (np.all(self.exposure) and self._sums.any()):
            return -math.inf
        mean = float(self._sums.sum() / seen.sum())
        variance = max(mean * (1 - mean), 1e-9) * float((1 / seen).sum())
        times = mean * mean / variance / RESPONSE_FROM
        errors = math.sqrt((1 + 1 / times) * (math.log1p(times) - 2 * math.log(2 * RESPONSE)))
        live, canary = (self._sums / seen).tolist()
        return canary - live + errors * math.sqrt(variance)

    def _to_proof(self, log_threshold: float, requests: int, proved: bool) -> Forecast | None:
        """Further requests; every one counts that the comparison has seen, also if it gave nothing to this check."""
        if proved:
            return PROVED
        sides = zip(self._sides, self._growth, strict=True)
        blocks = latest(growth.forecast(self._good[side], log_threshold) for side, growth in sides)
        if blocks is None:
            return None
        return blocks.scaled(self._block * requests / int(self.counts.sum()))

    def restart(self, block: int) -> None:
        self._block, self._open = block, []
        self._growth = [ProofGrowth(len(STRENGTHS)) for _ in self._sides]

    def state(self) -> State:
        return {
            "block": np.array(self._block),
            "labels": np.array([canary for canary, _ in self._open], bool),
            "values": np.array([value for _, value in self._open], np.float64),
            "bad": self._bad.copy(),
            "unlike": self._unlike.copy(),
            "good": self._good.copy(),
            "most": self._most.copy(),
            "counts": self.counts.copy(),
            "sums": self._sums.copy(),
            "shifts": self._shifts.copy(),
            "exposure": np.array(self.exposure),
            "growth": np.array([growth.state() for growth in self._growth]),
        }

    def restore(self, state: Mapping[str, NDArray]) -> None:
        self._block = int(state["block"])
        self._open = list(zip(state["labels"].tolist(), state["values"].tolist(), strict=True))
        self._bad, self._good = np.array(state["bad"]), np.array(state["good"])
        # Earlier releases asked "worse than the tolerance" alone, which is less than "worse at all".
        self._unlike = np.array(state.get("unlike", state["bad"]))
        self._most, self.counts, self._sums = (np.array(state[name]) for name in ("most", "counts", "sums"))
        if "shifts" in state:
            self._shifts, (live, canary) = np.array(state["shifts"]), state["exposure"].tolist()
            self.exposure = live, canary
        elif self.check.unit is Unit.GRADE:  # an earlier release, which proved something else of grades
            self._good[:] = self._most[1] = 0
        for growth, saved in zip(self._growth, state.get("growth", ()), strict=False):
            growth.restore(saved)

    def _close(self, rng: np.random.Generator) -> None:
        labels = np.array([canary for canary, _ in self._open])
        values = np.array([value for _, value in self._open])
        self._open = []
        k, n = int(labels.sum()), len(labels)
        if 0 < k < n and self.check.unit in (Unit.RATIO, Unit.DIFFERENCE):
            units = np.log(values) if self.check.unit is Unit.RATIO else values
            weight = k * (n - k) / n
            self._shifts += weight * float(np.median(units[labels][:, None] - units[~labels])), weight
        for side, growth in zip(self._sides, self._growth, strict=True):
            before = self._good[side].copy()
            if 0 < k < n:
                self._bet(side, labels, values, rng)
            growth.add(self._good[side] - before)
        if any(self._beyond(side) for side in self._sides):
            self._most[0, 0] = max(self._most[0, 0], self.log_evidence())

    def _bet(self, side: int, labels: NDArray, values: NDArray, rng: np.random.Generator) -> None:
        """On one block's draw."""
        if self.check.unit is Unit.RATE:
            self._bet_on_rates(side, labels, values)
        else:
            k, n = int(labels.sum()), len(labels)
            score = float(_ranks(self._shifted(labels, values, side), rng)[labels].sum())
            for i, strength in enumerate(STRENGTHS):
                bad = strength if side == 0 else -strength
                self._bad[side, i] += bad * score - _log_mean_of_draws(n, k, bad)
                if self.check.unit is not Unit.GRADE:
                    self._good[side, i] += -bad * score - _log_mean_of_draws(n, k, -bad)
        if self.check.unit is Unit.GRADE:
            _bet_on_chances(self._unlike[side], 1 if side == 0 else -1, labels, values)
            won = float(values[labels].mean() - values[~labels].mean()) + self.check.proof
            self._good[side] += np.log1p(np.array(BETS) * won / (1 - self.check.proof))
        if not self._beyond(side, for_proof=True):
            self._most[1, side] = max(self._most[1, side], _log_mean(self._good[side]))

    def _bet_on_rates(self, side: int, labels: NDArray, values: NDArray) -> None:
        """Values of 0 and 1 are as good as ranks, which would only add the noise of breaking all their ties.

        Each 0 of the side that should be lower is a 1 with the tolerance's probability.
        """
        towards, lifted = (1, ~labels) if side == 0 else (-1, labels)
        within = np.maximum(values, self.check.tolerance * lifted)
        _bet_on_chances(self._bad[side], towards, labels, within)
        _bet_on_chances(self._good[side], -towards, labels, within)
        _bet_on_chances(self._unlike[side], towards, labels, values)

    def _shifted(self, labels: NDArray, values: NDArray, side: int) -> NDArray[np.float64]:
        """The values as if the canary were the whole tolerance better than it is."""
        tolerance = self.check.tolerance
        if self.check.unit is Unit.RATIO:
            factor = 1 / (1 + tolerance) if side == 0 else 1 + tolerance
            return np.where(labels, values * factor, values)
        if self.check.unit is Unit.DIFFERENCE:
            return np.where(labels, values + (-tolerance if side == 0 else tolerance), values)
        return values


def _block(weight: float, unit: Unit) -> int:
    """Requests a block: enough that two of the rarer version are in it."""
    few = max(round(2 / min(weight, 1 - weight)), 8)
    return min(few * (RATE_BLOCKS if unit is Unit.RATE else 1), 200)


def _ranks(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Ranks of n values from -(n-1)/2n to (n-1)/2n, ties broken by lot."""
    n = len(values)
    order = np.lexsort((rng.random(n), values))
    ranks = np.empty(n)
    ranks[order] = (np.arange(n) - (n - 1) / 2) / n
    return ranks


@lru_cache(maxsize=16384)
def _log_mean_of_draws(n: int, k: int, strength: float, ones: int | None = None) -> float:
    """ln of the mean of exp(strength * sum) over all ways to draw k of n: of the ranks, or of `ones` 1 and the rest
    0."""
    ways = _log_choose(n, k)
    if ones is not None:
        drawn = range(max(0, k - (n - ones)), min(k, ones) + 1)
        terms = [_log_choose(ones, j) + _log_choose(n - ones, k - j) + strength * j for j in drawn]
        return float(np.logaddexp.reduce(terms) - ways)
    # An elementary symmetric polynomial; polynomial[j] is ln of the sum over all ways to draw j of the terms so far.
    polynomial = np.full(k + 1, -np.inf)
    polynomial[0] = 0
    for term in strength * (np.arange(n) - (n - 1) / 2) / n:
        polynomial[1:] = np.logaddexp(polynomial[1:], polynomial[:-1] + term)
    return float(polynomial[k] - ways)


def _bet_on_chances(wealth: NDArray, towards: int, labels: NDArray, chances: NDArray) -> None:
    """Add to ln wealth by `ODDS` what bets on a block's draw won, where each request is a 1 with a chance of its own.

    What is bet is the mean over the chances, so that none of it is luck.
    """
    k, n = int(labels.sum()), len(labels)
    drawn, left = _how_many(chances[labels]), _how_many(chances[~labels])
    for i, odds in enumerate(ODDS):
        strength = towards * odds
        won = [
            chance + other + strength * ones - _log_mean_of_draws(n, k, strength, ones + others)
            for (ones, chance), (others, other) in product(drawn, left)
        ]
        wealth[i] += float(np.logaddexp.reduce(won))


def _how_many(chances: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Of so many with these chances of being 1: how many are, and ln of its probability, as far as it matters."""
    odds = np.ones(1)
    for chance in chances[(chances > 0) & (chances < 1)]:
        odds = np.convolve(odds, (1 - chance, chance))
    certain = int((chances >= 1).sum())
    return [(certain + int(more), math.log(odds[more])) for more in np.flatnonzero(odds > 1e-13 * odds.max())]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_mean(values: NDArray) -> float:
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).mean()))


def _key(asker: Hashable) -> int:
    raw = asker if isinstance(asker, bytes) else repr(asker).encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)
