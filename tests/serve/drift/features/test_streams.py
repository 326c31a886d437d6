"""Streams in which only the way requests come is unusual raise no alarm about their prompts: `make drift-streams`."""

from __future__ import annotations

import pytest

from serve.errors import LoradockError
from tests.campaigns import drift_streams
from tests.support.prompts import Unreachable


@pytest.fixture(autouse=True)
def texts():
    try:
        drift_streams.embedding(), drift_streams.questions("general")
    except (Unreachable, LoradockError) as missing:
        pytest.skip(str(missing))


STREAMS = (
    "popular, Zipf 1.0, longest first",
    "users, Zipf 1.0",
    "sessions of six, 1 at a time",
    "bursts of 300",
    "openings 454 - 555",
    "openings, no template",
    "short openings, no template",
    "tenants, five openings",
)


@pytest.mark.parametrize("name", STREAMS)
def test_nothing_is_said_that_is_not_so(name):
    outcome = drift_streams.stream(name, 2, requests=3000, reference=400)
    assert not outcome["false"], outcome
    if "opening" in drift_streams.SAID.get(name, ()):
        assert "opening" in {signal for _, signal in outcome["alarms"]}, "it is said as what it is"


def test_another_language_behind_a_new_system_prompt_is_seen_within_sixty_requests():
    try:
        drift_streams.questions("german")
    except Unreachable as missing:
        pytest.skip(str(missing))
    line = next(drift_streams.changes(1, 3))
    assert line.endswith("1 of 1 |") and "german" in line, line
