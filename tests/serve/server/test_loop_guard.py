"""The watch over the event loop in tests tells of a step that computes, and no full look for garbage falls into one."""

from __future__ import annotations

import gc
import time

import pytest

from tests.support import loop_guard


async def test_a_step_that_computes_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_guard, "STEP_SECONDS", 0.2)

    async def step() -> None:
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            pass

    with pytest.raises(AssertionError, match=r"GET /: a step computed for 0\.3"), loop_guard.guarded():
        await loop_guard._Stepped(step(), "GET /")


async def test_no_full_look_for_garbage_falls_into_a_test():
    full, kept = gc.get_stats()[2]["collections"], []
    for _ in range(200):  # Python's own rule would look through all of it some times
        kept.append([[number] for number in range(10_000)])
    assert gc.get_stats()[2]["collections"] == full and gc.isenabled()
