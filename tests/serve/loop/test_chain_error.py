"""The chain's error, with simulated scores and requests and the server's own decisions; whole: `make loop-error`."""

from __future__ import annotations

from tests.campaigns.loop_error import errors, month, np


def test_bad_candidates_are_promoted_no_more_often_than_stated():
    # Stated: 0.2 of 60 loops, which is 12.
    assert sum(errors(60, 0.2, 2, seed=3, ways=("new", "reference", "golden")).values()) <= 12


def test_a_bad_canary_stops_a_candidate_that_the_gate_let_pass():
    assert sum(errors(4, 0.2, 1, seed=4, ways=("canary",)).values()) <= 1


def test_a_good_candidate_comes_through():
    assert month(np.random.default_rng(1), "", 0.2, 1)
