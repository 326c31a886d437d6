"""Waiting for other tasks, threads and processes, for as long as a slow and busy machine may take."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

SECONDS = 60


def eventually(holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait for `holds()` to be true; its last answer either way."""
    end, pause = time.monotonic() + seconds, 0.01
    while not (answer := holds()) and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return answer


async def settled(holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """`eventually` on an event loop, where `holds` may be a coroutine function."""
    end = time.monotonic() + seconds
    while True:
        answer = holds()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer or time.monotonic() > end:
            return answer
        await asyncio.sleep(0.01)
