"""When Python looks for garbage: a full collection stops every answer, as long as there are objects to look through.

With a thousand requests open that is a fifth of a second, and Python's own rule would have it twice a second then. What
the start left is not looked through again, young objects are collected as ever, and all of them in a quiet moment.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG, MIDDLE = 5_000, 10  # net new objects, and collections of those, that begin a collection
NEVER = 1_000_000
LOOK, AT_THE_LATEST = 5.0, 300.0  # seconds
FEW = 100  # connections


async def collect_in_quiet(
    connections: Callable[[], int], *, look: float = LOOK, latest: float = AT_THE_LATEST
) -> None:
    """Until cancelled; `connections` says how many are open. Called once the server is ready."""
    before = gc.get_threshold()
    gc.collect()  # what is garbage by now would stay for ever
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    collected = time.monotonic()
    try:
        while True:
            await asyncio.sleep(look)
            if connections() <= FEW or time.monotonic() - collected >= latest:
                gc.collect()
                collected = time.monotonic()
    finally:
        gc.set_threshold(*before)
