"""The short version of `make hostile`: every kind once, beside a victim who streams and an operator who promotes."""

from __future__ import annotations

import pytest

from tests.campaigns.hostile import staged, sweep

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_no_kind_of_hostile_request_breaks_the_server_or_disturbs_another_tenant(tmp_path):
    with staged(tmp_path) as stage:
        outcomes, seen = sweep(stage)
    assert len(outcomes) >= 60, "the hostile clients did not end"
    broken = {
        kind: outcome
        for kind, outcome in outcomes.items()
        if any(status.startswith("5") and status not in ("503", "504") for status in outcome)
    }
    assert not broken
    assert seen.restarts == 0
    assert not seen.wrong and seen.answers > 10
