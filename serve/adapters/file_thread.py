"""One thread for what takes a whole core for a while: unpacking adapters and looking through their tensors.

Four archives unpacked side by side on two cores held an engine's next token back for more than a second.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from serve.adapters.fair_threads import FairThreads

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_REST = 0.01

_THREAD = FairThreads(1, "adapter-files")


async def in_turn(call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """As `asyncio.to_thread`, one call at a time in the whole process, each tenant in its turn."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_THREAD, partial(context.run, call, *args, **named))


def take_turn(call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """As `in_turn`, for whoever is on another thread than the event loop's, and waits here."""
    return _THREAD.submit(partial(contextvars.copy_context().run, call, *args, **named)).result()


class _Used(threading.local):
    cpu = 0.0


_USED = _Used()


def rest() -> None:
    """Between two pieces of long work: sleep as long as this thread has computed since the last time.

    Beside somebody who computes without a pause an engine's threads, which wait for one another some hundred times a
    step, lose a time slice of the system's, some milliseconds, each time.
    """
    used = time.thread_time()
    time.sleep(min(max(used - _USED.cpu, 0.0), LONGEST_REST))
    _USED.cpu = time.thread_time()
