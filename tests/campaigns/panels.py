"""Ten minutes of mixed traffic, scraped as often as shipped: does every panel show the numbers that were sent?

    python -m tests.campaigns.panels [SECONDS]

Starts the server over an engine whose numbers are known, and Debian's Prometheus on the rendered files. The same is
checked in `tests/serve/telemetry/test_live_panels.py` in some seconds, with a scrape a second.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.support.live_panels import live_panels
from tests.support.panel_values import PANELS


def main(seconds: float = 600.0) -> int:
    """The number of problems."""
    began = time.monotonic()
    # Rates over twice as long: what comes after the traffic belongs to the window, too.
    with tempfile.TemporaryDirectory() as folder, live_panels(Path(folder), 2 * seconds + 600, every=None) as panels:
        panels.play(seconds)
        problems = panels.problems()
        traffic = panels.traffic
        took = time.monotonic() - began
        print(f"{len(traffic.sent)} requests in {took:.0f} s, {sum(traffic.rollbacks.values())} rollbacks")
    print(*problems, sep="\n")
    print(f"{sum(map(len, PANELS.values()))} panels, {len(problems)} problems")
    return len(problems)


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])) > 0)
