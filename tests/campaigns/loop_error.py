"""How often the loop promotes a candidate that it must not: the gate, the canary and the month's budget as they are.

    python -m tests.campaigns.loop_error [LOOPS] [ALPHA] [BUDGET] [SEED] [CLUSTER]

Each loop has one month, in which as many tries are decided as its budget lets; one of them may have begun in the month
before. Each of its tries has a candidate that is bad by exactly as much as may not be, in one way: no better on new
traffic, no better on the traffic of now, whose topics stand 40/60 where 60/40 were gathered, worse by the tolerance on
one reference or on the golden set, or worse by the tolerance in a check of its canary; in all others it is good. Scores
and requests are simulated; all decisions are the server's own code. A loop that promotes one of them has erred: at most
ALPHA of them may. Good candidates are counted too, as a comparison. CLUSTER: so many examples are of one asker, and
move together; there are as many askers as examples without. 200 loops take some 3 minutes on one core.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from serve.loop.chain import promotes, spend
from serve.loop.gate import GOLDEN, NEW, REFERENCE, Gate, Part, compared
from serve.sequential.sequential_test import Comparison, Verdict

TOLERANCE, GOLDEN_TOLERANCE = 0.05, 0.1
EXAMPLES, CASES, REFERENCES = 400, 150, 3
REQUESTS, WEIGHT = 6000, 0.25
WAYS = ("new", "moved", "reference", "golden", "canary")
# By how much a candidate gains on one of two topics and loses on the other, where only their mix makes it better.
GAINS = (0.03, 0.1, 0.2)
# What a canary is worse by, exactly as much as its check tolerates.
CHECKS = ("error", "ended_by_length", "refusal", "inter_token", "first_token")


def pairs(rng: np.random.Generator, count: int, mean: float) -> list[tuple[float, float]]:
    """Likelihoods of one example each, whose mean difference is `mean`: small moves, or large ones of a few."""
    spread, share = ((0.02, 0.5), (0.2, 0.5), (0.6, 0.1))[rng.integers(3)]
    up = rng.random(count) < share
    moves = mean + np.where(up, spread * (1 - share), -spread * share)
    low, high = np.maximum(0.0, -moves), np.minimum(1.0, 1.0 - moves)
    live = low + rng.beta(2, 2, count) * (high - low)
    return list(zip(live.tolist(), (live + moves).tolist(), strict=True))


def cases(rng: np.random.Generator, count: int, mean: float) -> list[tuple[float, float]]:
    """Passes and fails of golden cases: `mean` is what the candidate gains."""
    live = rng.random(count) < 0.8
    candidate = np.where(live, rng.random(count) < 1 + mean / 0.8 if mean < 0 else True, rng.random(count) < 0.1)
    if mean < 0:  # it gains nowhere, and loses so much
        candidate = candidate & live
    return list(zip(live.astype(float).tolist(), candidate.astype(float).tolist(), strict=True))


def part(rng: np.random.Generator, kind: str, label: str, mean: float, alpha: float, cluster: int) -> Part:
    """Of examples whose likelihoods move by `mean`, `cluster` of one asker alike but for a little of their own."""
    alone = pairs(rng, EXAMPLES, mean)
    if cluster == 1:
        return compared(kind, label, alone, TOLERANCE, alpha)
    own = rng.uniform(-0.01, 0.01, (EXAMPLES, cluster))
    own -= own.mean(axis=1, keepdims=True)
    several = [(live, got + more) for (live, got), row in zip(alone, own, strict=True) for more in row]
    askers = [str(asker) for asker in range(EXAMPLES) for _ in range(cluster)]
    order = rng.permutation(len(several))
    return compared(kind, label, [several[i] for i in order], TOLERANCE, alpha, [askers[i] for i in order])


def moved(rng: np.random.Generator, alpha: float, cluster: int) -> Part:
    """Of examples that were gathered while six of ten askers asked of one topic; in the mix of now, four of ten, the
    candidate is no better."""
    gain = GAINS[rng.integers(len(GAINS))]
    topics = (rng.random(EXAMPLES) < 0.4).astype(int)
    means = np.where(topics == 0, gain, -gain * 0.4 / 0.6)
    alone = [pair for mean in means for pair in pairs(rng, 1, float(mean))]
    several = [pair for pair in alone for _ in range(cluster)]
    askers = [str(asker) for asker in range(EXAMPLES) for _ in range(cluster)]
    return compared(NEW, "", several, TOLERANCE, alpha, askers, np.repeat(topics, cluster).tolist())


def gate(rng: np.random.Generator, way: str, alpha: float, cluster: int = 1) -> Gate:
    """Of a candidate that is bad in this way."""
    bad = int(rng.integers(REFERENCES)) if way == "reference" else None
    gain = 0.0 if way == "new" else 0.1
    lost = [-TOLERANCE if number == bad else 0.02 for number in range(REFERENCES)]
    parts = [moved(rng, alpha, cluster) if way == "moved" else part(rng, NEW, "", gain, alpha, cluster)]
    parts += [part(rng, REFERENCE, "v1", mean, alpha, cluster) for mean in lost]
    fell = -GOLDEN_TOLERANCE if way == "golden" else 0.02
    return Gate(alpha, (*parts, compared(GOLDEN, "", cases(rng, CASES, fell), GOLDEN_TOLERANCE, alpha)))


def canary(rng: np.random.Generator, way: str, alpha: float) -> Verdict:
    """Of a canary that gets so many requests with the live version."""
    comparison = Comparison(WEIGHT, alpha=alpha, seed=int(rng.integers(1 << 31)))
    worse = CHECKS[int(rng.integers(len(CHECKS)))] if way == "canary" else ""
    tolerances = {check.name: check.tolerance for check in comparison.checks}
    rates = {"error": 0.01, "ended_by_length": 0.05, "refusal": 0.02}
    for number in range(REQUESTS):
        is_canary = bool(rng.random() < WEIGHT)
        values: dict[str, float | None] = {}
        for name, rate in rates.items():
            more = tolerances[name] * (1 - rate) if is_canary and name == worse else 0.0
            values[name] = float(rng.random() < rate + more)
        for name in ("inter_token", "first_token"):
            slower = 1 + tolerances[name] if is_canary and name == worse else 1.0
            values[name] = slower * float(np.exp(rng.normal(-4.0, 0.1)))
        if comparison.observe(is_canary, values, asker=number) is not Verdict.UNDECIDED:
            break
    return comparison.verdict


def month(rng: np.random.Generator, way: str, alpha: float, budget: int, cluster: int = 1) -> bool:
    """Whether one of the tries that are decided in a month promotes its candidate. A try that began in the month before
    has the level that it was given then, under another budget it may be."""
    spent = 0.0
    carried = alpha / int(rng.integers(1, budget + 1)) if rng.random() < 0.5 else 0.0
    while own := carried or spend(alpha, budget, spent):
        spent, carried = spent + own, 0.0
        judged = gate(rng, way, own, cluster)
        if judged.passed and promotes(judged.passed, canary(rng, way, own)):
            return True
    return False


def errors(
    loops: int, alpha: float, budget: int, seed: int, ways: Sequence[str] = WAYS, cluster: int = 1
) -> Counter[str]:
    """Loops that promoted a bad candidate, by the way in which it was bad."""
    rng = np.random.default_rng(seed)
    wrong: Counter[str] = Counter()
    for number in range(loops):
        way = ways[number % len(ways)]
        wrong[way] += month(rng, way, alpha, budget, cluster)
    return wrong


def main(loops: int = 200, alpha: float = 0.05, budget: int = 4, seed: int = 1, cluster: int = 1) -> None:
    wrong = errors(loops, alpha, budget, seed, cluster=cluster)
    total = sum(wrong.values())
    print(f"{total} of {loops} loops promoted a bad candidate within a month of {budget} tries; {alpha:g} is stated")
    for way in WAYS:
        print(f"  {way}: {wrong[way]} of {len(range(WAYS.index(way), loops, len(WAYS)))}")
    good = sum(month(np.random.default_rng(seed + number), "", alpha, budget, cluster) for number in range(20))
    print(f"{good} of 20 loops promoted a good one")
    assert total <= alpha * loops


if __name__ == "__main__":
    kinds = (int, float, int, int, int)
    main(*(kind(value) for kind, value in zip(kinds, sys.argv[1:], strict=False)))
