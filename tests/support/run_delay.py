"""How long processes wait for a processor beside what they run, by the kernel's schedstat.

before = ran(pids)
...
slowness(before, ran(pids))     # 1.0 on a quiet machine, 2.0 where they waited for as long as they ran
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# Between two looks, and the processor time between them below which they say nothing.
LOOK_SECONDS, LEAST_SECONDS = 0.5, 0.02


# By thread: nanoseconds on a processor, and waiting for one.
Ran = Mapping[int, tuple[int, int]]


def ran(pids: Iterable[int]) -> Ran:
    """All threads of these processes."""
    found = {}
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                spent, waited, _ = map(int, file.read_text().split())
                found[int(file.parent.name)] = spent, waited
    return found


def slowness(before: Ran, after: Ran) -> float | None:
    """How many times as long the thread took that ran most, as with a processor free: others wait beside it, and their
    waiting does not add up. None, if it ran next to nothing."""
    spent = {thread: each[0] - before[thread][0] for thread, each in after.items() if thread in before}
    most = max(spent, key=spent.__getitem__, default=0)
    if not spent or spent[most] < LEAST_SECONDS * 1e9:
        return None
    return 1 + max(after[most][1] - before[most][1], 0) / spent[most]


@dataclass
class Watched:
    """How slow some processes were, look by look."""

    pids: Sequence[int]
    times: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    def at(self, when: float) -> float:
        """At a time of `time.perf_counter`; as at the next look at which they ran."""
        place = bisect_right(self.times, when)
        return self.found[min(place, len(self.found) - 1)] if self.found else 1.0


@contextmanager
def watching(*every: Watched, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Fill them until the block ends."""
    end = threading.Event()

    def look() -> None:
        before = [ran(one.pids) for one in every]
        while not end.wait(LOOK_SECONDS):
            for number, one in enumerate(every):
                after = ran(one.pids)
                if (slow := slowness(before[number], after)) is not None:
                    one.times.append(clock())
                    one.found.append(slow)
                    before[number] = after

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
