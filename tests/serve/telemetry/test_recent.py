"""The last half hour, minute by minute, bounded however many versions are asked."""

from __future__ import annotations

import pytest

from serve.asgi.exchange import Exchange
from serve.telemetry.recent import MAX_VERSIONS, MINUTES, Recent


@pytest.fixture
def clock():
    return [6_000_000.0]


@pytest.fixture
def recent(clock):
    return Recent(clock=lambda: clock[0])


def exchange(first=0.04, status=200, adapter="tone", version="v2"):
    return Exchange(adapter, version, status, first, 1.0)


def test_a_minute_tells_requests_errors_and_the_bounds_of_its_latencies(recent):
    for _ in range(18):
        recent.take(exchange(0.04))
    recent.take(exchange(0.7))
    recent.take(exchange(0.7))
    recent.take(exchange(None, 503))
    recent.take(exchange(None, 404, "other", ""))
    (minute,) = recent.described("tone", "v2")
    assert (minute["requests"], minute["errors"], minute["at"]) == (21, 1, 6_000_000)
    assert (minute["first_token_p50"], minute["first_token_p95"]) == (0.05, 1)
    assert recent.described("other", "") == []


def test_what_was_slower_than_the_last_bound_is_that_and_nothing_is_none(recent):
    recent.take(exchange(1000))
    assert recent.described("tone", "v2")[0]["first_token_p95"] == 60
    recent.take(exchange(None, 503, version="v3"))
    assert recent.described("tone", "v3")[0]["first_token_p95"] is None


def test_half_an_hour_is_kept(recent, clock):
    for _ in range(MINUTES + 10):
        recent.take(exchange())
        clock[0] += 60
    assert len(recent.described("tone", "v2")) == MINUTES - 1
    clock[0] += 60 * MINUTES
    assert recent.described("tone", "v2") == []


def test_among_too_many_versions_the_longest_silent_goes(recent, clock):
    for number in range(MAX_VERSIONS + 5):
        recent.take(exchange(adapter=f"a{number}"))
        clock[0] += 1
    assert recent.described("a0", "v2") == []
    assert recent.described(f"a{MAX_VERSIONS + 4}", "v2")


def test_columns_have_a_place_for_each_minute_and_the_quantiles_of_all(recent, clock):
    assert recent.columns("tone", "v2") is None
    for _ in range(19):
        recent.take(exchange(0.04))
    clock[0] += 120
    recent.take(exchange(0.7))
    recent.take(exchange(None, 503))
    columns = recent.columns("tone", "v2")
    assert columns["from"] == 6_000_120 - 29 * 60
    assert columns["requests"] == [0] * 27 + [19, 0, 2] and columns["errors"] == [0] * 29 + [1]
    assert columns["first_token_p95"] == [None] * 27 + [0.05, None, 1]
    whole = columns["all"]
    assert (whole["requests"], whole["errors"], whole["answers"]) == (21, 1, 20)
    assert (whole["first_token_p50"], whole["first_token_p95"], whole["inter_token_p95"]) == (0.05, 0.05, None)
    assert recent.totals() == {("tone", "v2"): (21, 1)}


def test_what_is_older_than_half_an_hour_counts_no_more(recent, clock):
    recent.take(exchange())
    clock[0] += 60 * MINUTES
    assert recent.totals() == {} and recent.columns("tone", "v2") is None
