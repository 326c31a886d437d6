"""A verdict and the effect that is reported say the same; ratings count in it, and who rates does not decide it."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from serve.sequential.sequential_test import (
    CHECKS,
    ERRORS,
    FEW,
    LATENCY,
    ODDS,
    QUALITY,
    RESPONSE,
    Check,
    Comparison,
    Unit,
    Verdict,
    Worse,
    _bet_on_chances,
)
from tests.serve.sequential.test_sequential_test import at_most

RATING = next(check for check in CHECKS if check.name == "rating")
ERROR = Check("error", ERRORS, Worse.HIGHER, Unit.RATE, 0.05, required=True)
STREAMS = 5


def rated(seed, live, canary, *, share=0.3, unhappy=1.0, requests=2500, weight=0.5, alpha=0.05):
    """A comparison of errors, of which there are none, and ratings: `live` and `canary` are happy so often, a part
    `share` of the happy rates, and of the canary's unhappy ones `unhappy` times as many."""
    rng = np.random.default_rng(seed)
    comparison = Comparison(weight, checks=[ERROR, RATING], alpha=alpha, seed=seed)
    for asker in range(requests):
        is_canary = bool(rng.random() < weight)
        comparison.observe(is_canary, {"error": 0.0}, asker=f"{asker}")
        happy = rng.random() < (canary if is_canary else live)
        if rng.random() < share * (unhappy if is_canary and not happy else 1.0):
            comparison.observe(is_canary, {"rating": float(happy)}, asker=f"{asker} rates")
        if comparison.verdict is not Verdict.UNDECIDED:
            break
    return comparison


def result(comparison, name="rating"):
    return next(each for each in comparison.results() if each.name == name)


def verdicts(**how):
    return [rated(seed, **how).verdict for seed in range(STREAMS)]


def test_a_version_that_is_rated_worse_by_ten_points_is_not_proved():
    assert Verdict.PROVED not in verdicts(live=0.8, canary=0.7)


def test_a_version_that_is_rated_as_well_is_proved_by_its_ratings_too():
    comparisons = [rated(seed, live=0.8, canary=0.8, share=0.5) for seed in range(STREAMS)]
    proved = [each for each in comparisons if each.verdict is Verdict.PROVED]
    assert len(proved) >= STREAMS / 2
    for comparison in proved:
        assert result(comparison).proved or result(comparison).canary < FEW


def test_where_hardly_anybody_rates_the_other_checks_prove():
    for seed in range(STREAMS):
        comparison = rated(seed, live=0.8, canary=0.8, share=0.02)
        assert comparison.verdict is Verdict.PROVED or result(comparison).effect < -0.1


def test_worse_ratings_are_worse():
    assert verdicts(live=0.8, canary=0.5).count(Verdict.WORSE) >= STREAMS - 1


def test_a_canary_of_which_every_fifth_answer_gets_a_thumb_down_is_worse_soon():
    """Where nearly all ratings are the same, ranks whose ties chance breaks see little: half took 580 here."""
    comparisons = [rated(seed, live=1.0, canary=0.81, share=1.0, requests=350, alpha=0.01) for seed in range(10)]
    assert all(each.verdict is Verdict.WORSE for each in comparisons)


@pytest.mark.parametrize("weight", [0.1, 0.5])
@pytest.mark.parametrize("grades", [(0.0, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)])
def test_a_canary_that_is_rated_as_the_live_version_is_hardly_ever_worse(weight, grades):
    alpha, runs, worse = 0.2, 60, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        comparison = Comparison(weight, checks=[RATING], alpha=alpha, seed=seed)
        for number in range(600):
            mood = 0.7 + 0.2 * math.sin(number / 60)
            grade = grades[int(rng.binomial(len(grades) - 1, mood))]
            comparison.observe(bool(rng.random() < weight), {"rating": grade})
        worse += comparison.verdict is Verdict.WORSE
    assert worse <= at_most(alpha, runs)


def test_what_is_bet_on_grades_is_fair_to_the_last_bit():
    """The mean capital over all draws of a block is 1, whatever its grades."""
    grades = np.array([0.0, 1.0, 1.0, 0.3, 0.75, 0.5])
    for drawn in (1, 3):
        won = np.zeros((2, len(ODDS)))
        ways = list(combinations(range(len(grades)), drawn))
        for way in ways:
            labels = np.isin(np.arange(len(grades)), way)
            for side, towards in enumerate((1, -1)):
                wealth = np.zeros(len(ODDS))
                _bet_on_chances(wealth, towards, labels, grades)
                won[side] += np.exp(wealth) / len(ways)
        np.testing.assert_allclose(won, 1.0, rtol=1e-9)


def test_unhappy_askers_who_rate_more_often_make_no_version_worse():
    runs = 30
    comparisons = [rated(seed, live=0.8, canary=0.8, unhappy=2.5, share=0.35) for seed in range(runs)]
    assert sum(each.verdict is Verdict.WORSE for each in comparisons) <= at_most(RESPONSE, runs)
    noted = [result(each).note for each in comparisons if result(each).note]
    assert len(noted) > runs / 2 and all("times as often" in note for note in noted)


def mixed(rng, labels):
    """Most requests are slower by 12 %, the others faster by 36 %: the geometric mean stays."""
    factor = np.where(rng.random(len(labels)) < 0.8, 1.12, 0.64)
    return 0.02 * np.exp(rng.normal(0, 0.15, len(labels))) * np.where(labels, factor, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_the_effect_that_is_reported_is_the_one_that_is_tested(seed):
    rng = np.random.default_rng(seed)
    check = Check("inter_token", LATENCY, Worse.HIGHER, Unit.RATIO, 0.05, required=True)
    comparison = Comparison(0.25, checks=[check], alpha=0.05, seed=seed)
    labels = rng.random(2000) < 0.25
    for canary, value in zip(labels, mixed(rng, labels), strict=True):
        comparison.observe(bool(canary), {"inter_token": float(value)})
        said = result(comparison, "inter_token")
        if comparison.verdict is Verdict.WORSE:
            assert said.effect > 1.05
            break
        if comparison.verdict is Verdict.PROVED:
            assert said.effect <= 1.05
            break


def test_a_plain_shift_is_reported_as_it_is():
    rng = np.random.default_rng(0)
    checks = [
        Check("first_token", LATENCY, Worse.HIGHER, Unit.RATIO, 0.1),
        Check("mean_logprob", QUALITY, Worse.EITHER, Unit.DIFFERENCE, 0.15),
    ]
    comparison = Comparison(0.25, checks=checks, seed=0)
    for _ in range(2000):
        canary = bool(rng.random() < 0.25)
        load = math.exp(rng.normal(0, 0.1))
        values = {"first_token": load * (1.3 if canary else 1.0), "mean_logprob": rng.normal(-1, 0.2) - 0.3 * canary}
        comparison.observe(canary, values)
    assert result(comparison, "first_token").effect == pytest.approx(1.3, abs=0.03)
    assert result(comparison, "mean_logprob").effect == pytest.approx(-0.3, abs=0.03)
    again = Comparison.from_state(comparison.state(), checks)
    assert again.results() == comparison.results()


def test_a_proof_of_ratings_by_an_earlier_release_begins_anew():
    comparison = rated(0, live=0.8, canary=0.8)
    state = {name: value for name, value in comparison.state().items() if not name.endswith(("shifts", "exposure"))}
    state["verdict"] = np.array("undecided")
    again = Comparison.from_state(state, [ERROR, RATING])
    assert result(again).log_proof == pytest.approx(0.0) and not result(again).proved
