"""A worse canary is found at the stated error, and a good one proves itself, while load and users wander."""

from __future__ import annotations

import math
import os
from itertools import product

import numpy as np
import pytest

from serve.sequential.sequential_test import (
    CHECKS,
    LATENCY,
    QUALITY,
    Check,
    Comparison,
    Unit,
    Verdict,
    Worse,
    _CheckTest,
    _log_mean_of_draws,
)

LONG = "LORADOCK_TEST_DRIFT_STREAMS" in os.environ
STREAMS = 400 if LONG else 24


def at_most(alpha, runs):
    """How many of `runs` may end by chance where each does with `alpha` at most, 99 % sure."""
    return alpha * runs + 2.33 * math.sqrt(runs * alpha * (1 - alpha))


def latency(tolerance):
    return Check("inter_token", LATENCY, Worse.HIGHER, Unit.RATIO, tolerance, required=True)


def judged(make, seed, *, checks, weight=0.1, alpha=0.01, requests=3000):
    """(verdict, requests, of the canary) of a stream: make(rng, labels) gives the values of each check."""
    rng = np.random.default_rng(seed)
    labels = rng.random(requests) < weight
    values = make(rng, labels)
    comparison = Comparison(weight, checks=checks, alpha=alpha, seed=seed)
    for i, canary in enumerate(labels):
        comparison.observe(bool(canary), {name: column[i] for name, column in values.items()})
        if comparison.verdict is not Verdict.UNDECIDED:
            return comparison.verdict, i + 1, int(labels[: i + 1].sum())
    return Verdict.UNDECIDED, requests, int(labels.sum())


def itl(slower):
    """Seconds between tokens under a load that doubles and halves: a random walk with a daily wave and bursts."""

    def make(rng, labels):
        n = len(labels)
        load = np.cumsum(rng.normal(0, 0.02, n)) + 0.4 * np.sin(np.arange(n) / 150)
        burst = np.repeat(rng.random(n // 20 + 1) < 0.1, 20)[:n] * 0.8
        return {"inter_token": 0.02 * np.exp(load + burst + rng.normal(0, 0.15, n)) * np.where(labels, slower, 1.0)}

    return make


def test_a_canary_like_the_live_version_is_hardly_ever_called_worse():
    alpha = 0.1
    runs = [
        judged(itl(1.0), seed, checks=[latency(0.0)], alpha=alpha, weight=weight, requests=1000)[0]
        for seed, weight in product(range(3 * STREAMS), (0.1, 0.5))
    ]
    false = sum(run is Verdict.WORSE for run in runs)
    n = len(runs)
    print(f"{false} of {n} called worse; alpha {alpha}")
    assert 0 < false <= alpha * n + 2.33 * math.sqrt(n * alpha * (1 - alpha))  # 99 %; and it can happen at all


@pytest.mark.parametrize(
    ("slower", "tolerance", "within"),
    # DRIFT's table, requests in all at a canary of 10 %
    [(1.05, 0.0, 1842), (1.10, 0.0, 520), (1.25, 0.0, 189), (1.10, 0.05, 1698), (1.25, 0.05, 228)],
)
def test_a_slower_canary_is_called_worse_in_time(slower, tolerance, within):
    runs = [judged(itl(slower), seed, checks=[latency(tolerance)], requests=5000) for seed in range(STREAMS)]
    worse = [requests for verdict, requests, _ in runs if verdict is Verdict.WORSE]
    print(f"+{slower - 1:.0%} at tolerance {tolerance:.0%}: {len(worse)}/{len(runs)}, median {np.median(worse):.0f}")
    assert len(worse) >= 0.9 * len(runs)
    assert np.median(worse) <= 1.25 * within


def test_what_lies_within_the_tolerance_is_not_called_worse_and_proves_itself():
    within = [judged(itl(1.04), seed, checks=[latency(0.05)], requests=2500)[0] for seed in range(STREAMS)]
    same = [judged(itl(1.0), seed, checks=[latency(0.10)], requests=2500) for seed in range(STREAMS)]
    assert within.count(Verdict.WORSE) <= at_most(0.01, len(within))
    proved = [requests for verdict, requests, _ in same if verdict is Verdict.PROVED]
    print(f"proved within 10 %: {len(proved)}/{len(same)}, median {np.median(proved):.0f} requests")
    assert len(proved) >= 0.9 * len(same)


def test_what_is_worse_by_more_than_the_tolerance_does_not_prove_itself():
    runs = [
        judged(itl(1.06), seed, checks=[latency(0.05)], alpha=0.05, requests=2500)[0] for seed in range(2 * STREAMS)
    ]
    assert runs.count(Verdict.PROVED) <= at_most(0.05, len(runs))


def damaged(rng, labels):
    """Answers of a version that lost weights: less sure of each token, longer, and sometimes failing."""
    n = len(labels)
    return {
        "mean_logprob": rng.normal(-0.9, 0.3, n) - 0.5 * labels,
        "length": rng.lognormal(4, 0.5, n) * np.where(labels, 2, 1),
        "ended_by_length": (rng.random(n) < np.where(labels, 0.6, 0.1)).astype(float),
        "error": (rng.random(n) < 0.01).astype(float),
        **itl(1.0)(rng, labels),
    }


def test_a_damaged_version_is_found_within_sixty_requests_by_the_default_checks():
    runs = [judged(damaged, seed, checks=CHECKS, requests=1500) for seed in range(STREAMS)]
    assert all(verdict is Verdict.WORSE for verdict, _, _ in runs)
    canary = [canary for _, _, canary in runs]
    print(f"damaged: median {np.median(canary):.0f} canary requests, most {max(canary)}")
    assert np.median(canary) <= 45 and max(canary) <= 75


def test_errors_are_compared_as_rates_with_a_tolerance():
    check = Check("error", "errors", Worse.HIGHER, Unit.RATE, 0.02, required=True)

    none_at_all = Check("error", "errors", Worse.HIGHER, Unit.RATE, 0.0)

    def failing(more):
        return lambda rng, labels: {"error": (rng.random(len(labels)) < 0.02 + more * labels).astype(float)}

    alike = [judged(failing(0.0), seed, checks=[none_at_all], alpha=0.1)[0] for seed in range(2 * STREAMS)]
    some = [judged(failing(0.015), seed, checks=[check], alpha=0.05)[0] for seed in range(STREAMS)]
    many = [judged(failing(0.20), seed, checks=[check])[0] for seed in range(STREAMS)]
    none = [judged(failing(0.0), seed, checks=[check], alpha=0.05, requests=8000)[0] for seed in range(STREAMS)]
    assert alike.count(Verdict.WORSE) <= at_most(0.1, len(alike))
    assert some.count(Verdict.WORSE) <= at_most(math.sqrt(0.05), len(some))
    assert many.count(Verdict.WORSE) >= 0.9 * STREAMS
    assert none.count(Verdict.PROVED) >= 0.6 * STREAMS


@pytest.mark.parametrize("side", [0, 1])
def test_a_bet_on_rates_is_fair_where_the_canary_is_worse_by_the_tolerance(side):
    tolerance, lower = 0.1, 0.3
    higher = lower + tolerance * (1 - lower)
    worse = Worse.HIGHER if side == 0 else Worse.LOWER
    labels = np.array([True, True, False, False, False])
    likes = {"_bad": np.where(labels == (side == 0), higher, lower), "_unlike": np.full(len(labels), lower)}
    mean = dict.fromkeys(likes, 0.0)
    for values in product((0.0, 1.0), repeat=len(labels)):
        test = _CheckTest(Check("error", "errors", worse, Unit.RATE, tolerance), len(labels), 1.0)
        before = test._bad[side].copy()
        test._bet_on_rates(side, labels, np.array(values))
        for wealth, chance in likes.items():
            won = np.exp(getattr(test, wealth)[side] - before)
            mean[wealth] += float(np.prod(np.where(values, chance, 1 - chance))) * won
    assert mean["_bad"] == pytest.approx(1.0) and mean["_unlike"] == pytest.approx(1.0)


@pytest.mark.parametrize(("rate", "least", "within"), [(0.07, 0.8, 1000), (0.05, 0.22, 3000)])
def test_small_rises_of_errors_are_seen(rate, least, within):
    check = Check("error", "errors", Worse.HIGHER, Unit.RATE, 0.02, required=True)

    def failing(rng, labels):
        return {"error": (rng.random(len(labels)) < np.where(labels, rate, 0.02)).astype(float)}

    runs = [judged(failing, seed, checks=[check], alpha=0.05, weight=0.25)[:2] for seed in range(2 * STREAMS)]
    seen = sorted(requests for verdict, requests in runs if verdict is Verdict.WORSE)
    print(f"errors of {rate:.0%} for 2 %: {len(seen)}/{len(runs)}, median {np.median(seen):.0f} of those seen")
    assert len(seen) >= least * len(runs) and np.median(seen) <= within


def test_a_comparison_of_rates_of_an_earlier_release_goes_on():
    check = Check("error", "errors", Worse.HIGHER, Unit.RATE, 0.02, required=True)
    comparison = Comparison(0.5, checks=[check], seed=1)
    for i in range(64):
        comparison.observe(i % 2 == 0, {"error": float(i % 8 == 0)})
    state = comparison.state()
    del state["0.unlike"]
    earlier = Comparison.from_state(state, checks=[check])
    assert comparison.verdict is Verdict.UNDECIDED and earlier.log_evidence() <= comparison.log_evidence()
    for i in range(1000):
        earlier.observe(i % 2 == 0, {"error": float(i % 8 == 0)})
    assert earlier.verdict is Verdict.WORSE


def test_either_way_is_worse_where_the_check_says_so():
    check = Check("length", QUALITY, Worse.EITHER, Unit.RATIO, 0.2, required=True)

    def long(factor):
        return lambda rng, labels: {"length": rng.lognormal(4, 0.4, len(labels)) * np.where(labels, factor, 1)}

    for factor, verdict in ((2.0, Verdict.WORSE), (0.5, Verdict.WORSE), (1.0, Verdict.PROVED)):
        assert judged(long(factor), 3, checks=[check], requests=6000)[0] is verdict


def test_an_asker_is_counted_once():
    comparison = Comparison(0.5, checks=[latency(0.0)], seed=1)
    for i in range(2000):  # two askers, one of them slow and always with the canary
        comparison.observe(i % 2 == 0, {"inter_token": 2.0 if i % 2 == 0 else 1.0}, asker=("user", i % 2))
    assert comparison.verdict is Verdict.UNDECIDED
    assert comparison.skipped == 1998


def test_the_mean_over_all_draws_is_exact():
    from itertools import combinations

    for n, k in ((8, 1), (8, 3), (9, 8)):
        ranks = (np.arange(n) - (n - 1) / 2) / n
        for strength in (1.0, 4.0, -4.0):
            every = [math.exp(strength * sum(ranks[i] for i in draw)) for draw in combinations(range(n), k)]
            assert _log_mean_of_draws(n, k, strength) == pytest.approx(math.log(np.mean(every)), abs=1e-12)
            assert _log_mean_of_draws(n, k, strength) == pytest.approx(_log_mean_of_draws(n, k, -strength), abs=1e-12)
            binary = [math.exp(strength * sum(i < 3 for i in draw)) for draw in combinations(range(n), k)]
            assert _log_mean_of_draws(n, k, strength, 3) == pytest.approx(math.log(np.mean(binary)), abs=1e-12)


def test_a_restored_comparison_goes_on_bit_for_bit():
    rng = np.random.default_rng(7)
    labels = rng.random(900) < 0.2
    values = damaged(rng, labels)
    comparison = Comparison(0.2, alpha=1e-9, seed=3)
    for i in range(900):
        if i == 333:
            twin = Comparison.from_state({name: np.array(value) for name, value in comparison.state().items()})
        given = {name: float(column[i]) for name, column in values.items()}
        for one in (comparison, twin) if i >= 333 else (comparison,):
            one.observe(bool(labels[i]), given, asker=i)
    assert repr(comparison.results()) == repr(twin.results())  # NaN is no NaN's equal
    assert comparison.verdict is twin.verdict
    with pytest.raises(ValueError, match="over other checks"):
        Comparison.from_state(comparison.state(), checks=[latency(0.0)])


def test_a_verdict_stays_and_says_why():
    comparison = Comparison(0.5, checks=[latency(0.0), *CHECKS[1:]], seed=1)
    for i in range(400):
        comparison.observe(i % 2 == 0, {"inter_token": 3.0 if i % 2 == 0 else 1.0, "first_token": None})
    for i in range(4000):
        comparison.observe(i % 2 == 0, {"inter_token": 1.0 if i % 2 == 0 else 3.0})
    assert comparison.verdict is Verdict.WORSE
    (reason,) = comparison.reasons()
    assert (reason.name, reason.group) == ("inter_token", "latency") and reason.canary == 2200
