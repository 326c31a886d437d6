"""vLLM builds an engine in a thread of its own, which a server that stops does not wait for.

No thread can be cancelled, and asyncio's own are waited for when the event loop ends. This one is not: its engine's
processes are killed, whereupon vLLM gives up; and what it still builds is discarded.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.05
# A build without a process to kill (it reads the model's files) is not waited for any longer.
GIVE_UP_SECONDS = 3.0


async def built(build: Callable[[], T], discard: Callable[[T], None]) -> T:
    """What `build` returns. If this is cancelled, the processes that it has started meanwhile are killed."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()
    others = set(multiprocessing.active_children())

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = build()
        except BaseException as failed:
            error = failed
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:  # the loop is closed
            pass
        if value is not None and abandoned.is_set():
            discard(value)

    abandoned = threading.Event()
    thread = threading.Thread(target=run, daemon=True, name="build-engine")
    thread.start()
    try:
        return await result
    except asyncio.CancelledError:
        abandoned.set()
        end = loop.time() + GIVE_UP_SECONDS
        while thread.is_alive() and loop.time() < end:
            kill(process for process in multiprocessing.active_children() if process not in others)
            await asyncio.sleep(POLL_SECONDS)
        raise


def kill(processes: Iterable[Any]) -> None:
    """At once, with all that came from them."""
    for pid in family(processes):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(processes: Iterable[Any]) -> set[int]:
    """Ids of these processes and all that came from them."""
    pids: set[int] = set()
    ahead = [process.pid for process in processes if process.pid and process.exitcode is None]
    while ahead:
        pid = ahead.pop()
        pids.add(pid)
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                ahead += map(int, (task / "children").read_text().split())
    return pids
