"""Identical versions behind the real fair queue are not called worse, slower ones are, whatever the share and the load.

The short form of `make canary-aa`.
"""

from __future__ import annotations

from itertools import product

import pytest

from serve.sequential.sequential_test import Verdict
from tests.campaigns.canary_aa import Case, Server, streams


def worse(outcomes):
    return [outcome.reason for outcome in outcomes if outcome.verdict is Verdict.WORSE]


def test_identical_versions_are_not_called_worse_at_any_share_and_load():
    outcomes = [
        outcome
        for weight, load in product((0.05, 0.25, 0.75, 0.9), (0.6, 1.2))
        for outcome in streams(Case(weight, load), 3, 500)
    ]
    assert len(worse(outcomes)) <= 6, "of 24 at alpha 10 %: a chance of 1 in 100"


def test_waiting_for_a_seat_counts_for_neither_version():
    """At three quarters of the traffic and under too much load, where the first tokens come late."""
    outcome = Server(Case(0.75, 1.2), 0, 800, end=False).run()
    effects = {check["check"]: check["effect"] for check in outcome.report["checks"]}
    assert outcome.waited > 1
    assert 0.8 < effects["first_token"] < 1.25 and 0.9 < effects["inter_token"] < 1.1


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_a_version_three_times_as_slow_is_called_worse_and_never_proved(weight):
    outcomes = streams(Case(weight, 0.9, slower=3.0, alpha=0.01), 3, 1500)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.WORSE] * 3


def test_a_constant_user_is_dealt_by_request_and_the_report_says_so():
    report = Server(Case(0.1, 0.6, users=0), 1, 600, end=False).run().report
    assert (report["dealt_by"], report["askers"]) == ("request", 1)
    assert report["skipped"] <= 5
    counted = next(check for check in report["checks"] if check["check"] == "inter_token")
    total = counted["canary_requests"] + counted["live_requests"]
    assert abs(counted["canary_requests"] / total - 0.1) < 0.02
