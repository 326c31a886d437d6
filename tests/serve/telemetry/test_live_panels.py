"""What the dashboards show is what was sent: known traffic, and a real Prometheus over a real server."""

from __future__ import annotations

import pytest

from tests.support.live_panels import live_panels
from tests.support.prometheus import HAS_PROMETHEUS

pytestmark = pytest.mark.skipif(not HAS_PROMETHEUS, reason="prometheus is not installed (Debian: prometheus)")


def test_every_panel_shows_the_numbers_that_were_sent(tmp_path):
    with live_panels(tmp_path) as panels:
        panels.play()
        problems = panels.problems()
    assert not problems, "\n".join(problems)
