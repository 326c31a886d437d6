"""Holds the tokens of streams back for some milliseconds, so that those of several steps go out in one piece.

A first token and a last one never wait. One timer releases all streams together: what each of them has by then is one
chunk, one message of TCP and one wake-up of its client, instead of one for each token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

log = logging.getLogger(__name__)


class Coalescing:
    """`hold(key, release)` calls `release` once, at most `seconds` later."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: dict[Hashable, Callable[[], None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, key: Hashable, release: Callable[[], None]) -> None:
        self._held[key] = release
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._release)

    def collect(self, queue: Any) -> None:
        """Have what vLLM's way puts into the queue of a stream held as well."""
        if type(queue) is RequestOutputCollector and queue.aggregate:
            queue.__class__ = HeldCollector
            held: Any = queue
            held.coalescing = self
            held.begun = False

    def _release(self) -> None:
        held, self._held = self._held, {}
        self._timer = None
        for release in held.values():
            try:
                release()
            except Exception:  # of one stream; the others wait too
                log.exception("a stream was not released")


class HeldCollector(RequestOutputCollector):
    """vLLM's, which wakes its reader for the first output and the last one; those between wait to be released."""

    coalescing: Coalescing
    begun: bool
    output: Any

    def put(self, output: Any) -> None:
        if not self.begun or not isinstance(output, RequestOutput) or output.finished:
            self.begun = True
            super().put(output)
            self.ready.set()  # vLLM takes its reader for awake while an output waits
            return
        if isinstance(self.output, RequestOutput):
            self.output.add(output, aggregate=self.aggregate)
        elif self.output is None:
            self.output = output
        self.coalescing.hold(self.request_id, self._wake)

    def _wake(self) -> None:
        if self.output is not None:
            self.ready.set()
