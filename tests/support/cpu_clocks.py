"""How much of the processor this process's threads have used, and its children."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

import psutil


def cpu_seconds() -> dict[str, float]:
    """CPU seconds by the name of a thread; of the process with all of its threads, and of its children."""
    used: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            name = f"thread {thread.name.split('_')[0]}"
            used[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    used["process"] = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used["children"] += times.user + times.system
    return dict(used)


def since(before: dict[str, float]) -> dict[str, float]:
    """What was used since `before`; of a thread that has ended nothing is known any more."""
    return {name: seconds - before.get(name, 0.0) for name, seconds in cpu_seconds().items()}
