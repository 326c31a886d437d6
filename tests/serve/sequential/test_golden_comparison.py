"""A canary is called worse on golden cases as rarely as alpha says, and soon enough when it is."""

from __future__ import annotations

import numpy as np
import pytest

from serve.sequential.golden_comparison import ALPHA_SHARE, MARGIN, TOLERANCE, cases_needed, compare
from tests.campaigns.golden_cases import drawn

ALPHA = 0.2


@pytest.mark.parametrize(("worse", "better"), [(0.10, 0.10), (0.02, 0.02), (TOLERANCE, 0.0), (0.3, 0.28)])
def test_a_canary_that_is_no_worse_than_the_tolerance_is_rarely_called_worse(worse, better):
    """Looked at after each of 500 cases."""
    lots = np.random.default_rng(1)
    called = sum(compare(drawn(lots, 500, 0.6, worse, better), ALPHA).worse for _ in range(400))
    allowed = ALPHA * ALPHA_SHARE * 400
    assert called <= allowed + 3 * np.sqrt(allowed), called


@pytest.mark.parametrize(("worse", "better"), [(MARGIN, 0.0), (0.3, 0.2)])
def test_a_canary_that_is_worse_by_the_margin_is_rarely_proved(worse, better):
    lots = np.random.default_rng(2)
    proved = sum(compare(drawn(lots, 500, 0.6, worse, better), ALPHA).proved for _ in range(400))
    assert proved <= ALPHA * 400 + 3 * np.sqrt(ALPHA * 400), proved


def test_ten_points_are_found_with_the_number_of_cases_that_is_said():
    lots, alpha = np.random.default_rng(3), 0.01
    needed = cases_needed(0.10, alpha * ALPHA_SHARE)
    found = [compare(drawn(lots, 2 * needed, 0.9, 0.10, 0.0), alpha).worse for _ in range(100)]
    half = [compare(drawn(lots, needed, 0.9, 0.10, 0.0), alpha).worse for _ in range(100)]
    assert np.mean(half) > 0.3 and np.mean(found) > 0.9, (needed, np.mean(half), np.mean(found))


def test_answers_that_are_all_alike_prove_it_once_there_are_enough():
    few = compare([(1.0, 1.0)] * 20, 0.01)
    assert not few.proved and few.needed_for_proof > 20
    enough = compare([(1.0, 1.0)] * few.needed_for_proof, 0.01)
    assert enough.proved and not enough.worse


def test_graded_scores_count_by_how_far_they_are_apart():
    slightly = compare([(0.8, 0.79)] * 300, 0.01)
    clearly = compare([(0.8, 0.5)] * 300, 0.01)
    assert not slightly.worse and clearly.worse and clearly.gap == pytest.approx(0.3)


def test_without_a_pair_nothing_is_said():
    nothing = compare([], 0.01)
    assert not nothing.worse and not nothing.proved and nothing.cases == 0
