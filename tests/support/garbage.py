"""What a call leaves behind until garbage is collected, which a busy server puts off."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable


async def left_by(call: Callable[[], Awaitable[object]]) -> int:
    """Lists, dictionaries and the like that are there once the call is over, and were not before; made twice."""
    await call()  # what is made once
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        await call()
        await asyncio.sleep(0.01)
        return len(gc.get_objects())
    finally:
        gc.enable()
        gc.unfreeze()
