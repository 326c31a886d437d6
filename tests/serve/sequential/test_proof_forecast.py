"""What a proof will take is said from the noise seen so far, with bounds that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.sequential.proof_forecast import LEAST_BLOCKS, PROVED, Forecast, ProofGrowth, latest
from serve.sequential.sequential_test import LATENCY, Check, Comparison, Unit, Verdict, Worse


def compared(seed, slower=1.0, noise=0.3, weight=0.1):
    """A comparison on one required check, and a request at a time for it."""
    check = Check("inter_token", LATENCY, Worse.HIGHER, Unit.RATIO, 0.10, required=True)
    comparison = Comparison(weight, checks=[check], seed=seed)
    rng = np.random.default_rng(seed)

    def ask():
        canary = bool(rng.random() < weight)
        value = 0.02 * rng.lognormal(0, noise) * (slower if canary else 1.0)
        return comparison.observe(canary, {"inter_token": value})

    return comparison, ask


def test_the_forecast_comes_true_within_its_bounds():
    inside = []
    for seed in range(40):
        comparison, ask = compared(seed)
        for _ in range(1000):
            ask()
        forecast, waited = comparison.to_proof(), 0
        if comparison.verdict is Verdict.PROVED:
            continue
        while comparison.verdict is Verdict.UNDECIDED and waited < 60_000:
            ask()
            waited += 1
        inside.append(forecast.low <= waited <= forecast.high)
    print(f"{sum(inside)} of {len(inside)} within the range")
    assert len(inside) >= 20 and sum(inside) >= 0.6 * len(inside)


def test_more_noise_takes_longer_and_a_slower_canary_is_not_in_sight():
    expected = []
    for noise in (0.2, 0.6):
        forecasts = []
        for seed in range(8):
            comparison, ask = compared(seed, noise=noise)
            for _ in range(600):
                ask()
            forecasts.append(comparison.to_proof().expected)
        expected.append(np.median(forecasts))
    assert 2 * expected[0] < expected[1]
    comparison, ask = compared(0, slower=1.5)
    for _ in range(1000):
        ask()
    assert comparison.to_proof().expected == math.inf


def test_nothing_is_said_before_there_is_something_to_say_it_from():
    comparison, ask = compared(0)
    for _ in range(20 * LEAST_BLOCKS - 1):
        ask()
    assert comparison.to_proof() is None
    ask()
    forecast = comparison.to_proof()
    assert forecast is not None and forecast.low <= forecast.expected <= forecast.high


def test_requests_that_do_not_count_lengthen_it():
    """Half of the requests come from askers who were counted."""
    once, often = (compared(3)[0] for _ in range(2))
    rng = np.random.default_rng(0)
    for number in range(2000):
        canary, value = bool(rng.random() < 0.1), {"inter_token": rng.lognormal(0, 0.3)}
        for comparison, times in ((once, 1), (often, 2)):
            for _ in range(times):
                comparison.observe(canary, value, asker=number)
    assert often.to_proof().expected == pytest.approx(2 * once.to_proof().expected)


def test_what_is_proved_takes_nothing_and_the_last_one_decides():
    comparison, ask = compared(0, slower=0.5)
    while comparison.verdict is Verdict.UNDECIDED:
        ask()
    assert comparison.to_proof() == PROVED == comparison.results()[0].to_proof
    late, unknown = Forecast(10.0, 200.0, math.inf), None
    assert latest([PROVED, late]) == late
    assert latest([PROVED, unknown]) is None and latest([]) is None


def test_growth_is_kept():
    growth, rng = ProofGrowth(3), np.random.default_rng(0)
    for _ in range(20):
        growth.add(rng.normal(0.2, 0.1, 3))
    twin = ProofGrowth(3)
    twin.restore(growth.state())
    assert twin.forecast(np.zeros(3), 4.6) == growth.forecast(np.zeros(3), 4.6) is not None
