"""When Python looks for garbage: a full collection stops every answer, as long as there are objects to look through.

With a thousand requests open that is a fifth of a second, and Python's own rule would have it twice a second then. What
the start left is not looked through again, young objects are collected as ever, and all of them in a quiet moment, or
once memory has grown much. Then the allocator gives back what is free: it would keep what a large body took.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import time
from collections.abc import Callable
from pathlib import Path

YOUNG, MIDDLE = 5_000, 10  # net new objects, and collections of those, that begin a collection
NEVER = 1_000_000
LOOK, AT_THE_LATEST = 5.0, 300.0  # seconds
FEW = 100  # connections
MUCH, SOME = 1 << 30, 32 << 20  # bytes by which memory has grown


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def give_back() -> None:
    """What the allocator has free goes to the system."""
    from serve.cpu_kernels.pages import release  # by now the engine has it

    release()


async def collect_in_quiet(
    connections: Callable[[], int],
    *,
    look: float = LOOK,
    latest: float = AT_THE_LATEST,
    resident: Callable[[], int] = resident,
    give_back: Callable[[], None] = give_back,
) -> None:
    """Until cancelled; `connections` says how many are open. Called once the server is ready."""
    before = gc.get_threshold()
    gc.collect()  # what is garbage by now would stay for ever
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    await asyncio.to_thread(give_back)  # the start left more free than any request does
    collected, settled = time.monotonic(), resident()
    try:
        while True:
            await asyncio.sleep(look)
            grown = resident() - settled
            if connections() <= FEW or time.monotonic() - collected >= latest or grown > MUCH:
                gc.collect()
                if grown > SOME:
                    await asyncio.to_thread(give_back)
                    settled = resident()
                collected = time.monotonic()
    finally:
        gc.set_threshold(*before)
