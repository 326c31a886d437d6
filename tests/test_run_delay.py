"""How slow a machine was for some processes: by what `fleet_ray` corrects its times."""

from __future__ import annotations

import os
import time

from tests.support.run_delay import ran, slowness

SECOND = 1_000_000_000


def test_the_thread_that_ran_most_says_how_slow_it_was():
    before = {1: (0, 0), 2: (0, 0), 3: (5 * SECOND, SECOND)}
    after = {1: (2 * SECOND, 4 * SECOND), 2: (SECOND // 10, 9 * SECOND), 3: (5 * SECOND, SECOND), 4: (SECOND, SECOND)}
    assert slowness(before, after) == 3.0
    assert slowness(before, before) is None
    assert slowness({}, after) is None


def test_this_process_is_read():
    before = ran([os.getpid()])
    began = time.thread_time()
    while time.thread_time() - began < 0.1:
        pass
    found = slowness(before, ran([os.getpid()]))
    assert found is not None and found >= 1.0
