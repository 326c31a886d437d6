"""What opens a try."""

from __future__ import annotations

from types import SimpleNamespace

from serve.loop.causes import RATINGS_COMPARED, Causes, Ratings
from serve.rollout.loop_policy import LoopPolicy

LIVE = SimpleNamespace(name="tone", version=3, id="tone@c0ffee", created=1000.0)
DAY = 86_400.0


def causes(drifted=(), history=(), ratings=None):
    drift = SimpleNamespace(summary=lambda: {"tone": list(drifted)})
    made = Causes(drift, lambda name: list(history), ratings or Ratings())
    made.look()
    return made


def test_an_open_alarm_of_the_live_version_opens_one():
    since = {"prompt": "2026-11-26T12:00:00+00:00", "output": "2026-11-26T11:59:00+00:00"}
    row = {"version": "v3", "drifted": ["output", "prompt"], "moved": {"prompt": "prompts are longer"}, "since": since}
    policy = LoopPolicy(on=("drift",))
    found = causes([row]).find(LIVE, policy, None, 0.0)
    assert (found.text, found.since) == ("output, prompt drifted: prompts are longer", 1795694340.0)
    for other in ({**row, "version": "v2"}, {**row, "drifted": []}):
        assert causes([other]).find(LIVE, policy, None, 0.0) is None
    assert causes([row]).find(LIVE, LoopPolicy(), None, 0.0) is None


def test_the_schedule_counts_from_the_last_try_or_the_version():
    policy = LoopPolicy(on=("schedule",), every=DAY)
    assert causes().find(LIVE, policy, None, 1000.0 + DAY).kind == "schedule"
    assert causes().find(LIVE, policy, 5000.0, 1000.0 + DAY) is None
    assert causes().find(LIVE, policy, None, 999.0 + DAY) is None


def test_one_key_alone_makes_no_ratings_fall():
    ratings, policy = Ratings(lambda adapter: 10), LoopPolicy(on=("ratings",))
    for number in range(60):
        ratings.take("tone", "v3", 1.0, f"key-{number % 6}")
    for _ in range(200):
        ratings.take("tone", "v3", 0.0, "stranger")
    assert causes(ratings=ratings).find(LIVE, policy, None, 0.0) is None, "of its ratings ten are looked at"
    for number in range(60):
        ratings.take("tone", "v3", 0.5, f"key-{number % 6}")
    found = causes(ratings=ratings).find(LIVE, policy, None, 0.0)
    assert found and "and the first 50 were 1.00" in found.text


def test_ratings_that_fell_open_one():
    ratings, policy = Ratings(), LoopPolicy(on=("ratings",))
    for value in [1.0] * RATINGS_COMPARED + [0.85] * RATINGS_COMPARED:
        assert causes(ratings=ratings).find(LIVE, policy, None, 0.0) is None
        ratings.take("tone", "v3", value)
    found = causes(ratings=ratings).find(LIVE, policy, None, 0.0)
    assert found.text == "the last 50 ratings are 0.85 on average, and the first 50 were 1.00"
    assert ratings.fall("tone", "v2") is None


def test_a_golden_score_that_fell_since_the_version_is_live_opens_one():
    fell = {"what": "golden_fell", "from_version": 3, "to_version": None, "why": "0.6 on 10 cases"}
    live = {"what": "promote", "from_version": 2, "to_version": 3, "why": ""}
    policy = LoopPolicy(on=("ratings",))
    assert "its golden score fell: 0.6" in causes(history=[live, fell]).find(LIVE, policy, None, DAY).text
    assert causes(history=[fell, live]).find(LIVE, policy, None, DAY) is None
