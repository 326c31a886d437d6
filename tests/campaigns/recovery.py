"""How soon a killed engine is back with its 16 adapters, against a warm start of the server; both in one run.

    python -m tests.campaigns.recovery [ROUNDS]

Each round starts the server over a data directory that holds the adapters (warm: all files are in the page cache),
waits until they are in the engine, kills it, and waits again; then once more with 16 streams that never stop asking.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from tests.support.crowd import ADAPTERS, STREAMS, Crowd, engines, residents, row, stock
from tests.support.lora import WORDS, trained
from tests.support.server import SMALL, Server

FLAGS = ("--restart-wait", "120", "--max-restarts", "100", *SMALL)


def ready(server: Server, after: int) -> float:
    """The moment at which it says so, with all adapters in an engine that was restarted more than `after` times."""
    while True:
        with suppress(httpx.TransportError):
            if server.http.get("/ready", timeout=5).status_code == 200:
                now, seen = time.monotonic(), row(server)
                if seen["restarts"] > after:
                    assert len(residents(server)) == ADAPTERS, seen["resident"]
                    return now
        time.sleep(0.05)


def killed(server: Server) -> float:
    """Seconds from the kill to ready."""
    before, began = row(server)["restarts"], time.monotonic()
    for pid in engines(server):
        os.kill(pid, signal.SIGKILL)
    return ready(server, before) - began


def main(rounds: int = 3) -> None:
    folder = Path(tempfile.mkdtemp())
    with Server(folder / "data", folder / "log", *FLAGS) as server:
        stock(server, trained(*WORDS), folder)
    starts, idle, busy = [], [], []
    for number in range(rounds):
        began = time.monotonic()
        with Server(folder / "data", folder / "log", *FLAGS) as server:
            starts.append(ready(server, -1) - began)
            idle.append(killed(server))
            with Crowd(server) as crowd:
                crowd.whole(STREAMS)
                busy.append(killed(server))
                crowd.whole(STREAMS)
        print(f"round {number + 1}: warm start {starts[-1]:.1f} s, killed {idle[-1]:.1f} s, "
              f"killed under {STREAMS} streams {busy[-1]:.1f} s", flush=True)  # fmt: skip
    start = statistics.median(starts)
    for name, times in (("idle", idle), (f"under {STREAMS} streams", busy)):
        ratios = sorted(one / other for one, other in zip(times, starts, strict=True))
        print(f"{name}: {statistics.median(times):.1f} s, {statistics.median(times) / start:.2f} of a warm start of "
              f"{start:.1f} s ({ratios[0]:.2f} to {ratios[-1]:.2f} in {rounds} rounds)")  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
