"""A process and all that it started, suspended and killed as one.

What it starts may be in process groups of its own, so it is found by who started whom.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_PROC = Path("/proc")


def send(root: int, number: signal.Signals) -> None:
    """To the process, then to what it started, the older ones first: one that is stopped starts nobody."""
    seen: set[int] = set()
    left = [root]
    while left:
        process = left.pop(0)
        if process in seen:
            continue
        seen.add(process)
        # Who is killed is asked for its children before: afterwards they are nobody's.
        below = children(process) if number == signal.SIGKILL else []
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue
        left += below or children(process)


def children(process: int) -> list[int]:
    """Those whom any thread of it started and that it has still."""
    found: list[int] = []
    try:
        for thread in (_PROC / str(process) / "task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except OSError:
        pass  # it has ended, or there is no /proc
    return found
