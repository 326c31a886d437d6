"""Shows finished exchanges to observers, in one thread behind a bounded queue.

The event loop offers an exchange and never waits: while the queue is full, exchanges are dropped and counted. An
exchange holds the tokens of its prompt, so the queue is bounded in bytes too.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Exchange

log = logging.getLogger(__name__)

QUEUE_SIZE = 2000
QUEUE_BYTES = 32 << 20
SAVE_SECONDS = 60.0


class Observer(Protocol):
    """Looks at exchanges. `observe` and `save` run in the worker's thread, `start` before it, `stop` after it."""

    def start(self) -> None:
        """Read what was saved, before the first exchange."""

    def observe(self, exchange: Exchange) -> None:
        """Look at one finished exchange."""

    def save(self) -> None:
        """Write what changed; called every minute."""

    def stop(self) -> None:
        """Write everything that changed, after the last exchange."""


class ExchangeWorker(Collector):
    """`offer` and `submit` belong to the event loop; the rest may be called from any thread but the worker's own."""

    def __init__(
        self,
        observers: Sequence[Observer],
        *,
        name: str = "exchange-worker",
        queue_size: int = QUEUE_SIZE,
        queue_bytes: int = QUEUE_BYTES,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self._observers = tuple(observers)
        self._name, self._save_seconds = name, save_seconds
        self._queue: queue.Queue[Exchange | Callable[[], None] | None] = queue.Queue(queue_size)
        self._queue_bytes, self._queued_bytes, self._counting = queue_bytes, 0, threading.Lock()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.dropped = 0
        self.cpu_seconds = 0.0
        self.handled = 0

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Start the thread, unless it runs already. Exchanges offered before are not looked at."""
        with self._starting:
            if self._thread is None:
                for observer in self._observers:
                    self._guarded(observer.start)
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Handle what is queued, save, and end the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        thread.join()
        for observer in self._observers:
            self._guarded(observer.stop)

    def offer(self, exchange: Exchange) -> None:
        """Have the observers look at an exchange; drop it while the queue is full."""
        self._put(exchange)

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the worker's thread, in order with the exchanges; drop it while the queue is full."""
        self._put(job)

    def settle(self) -> None:
        """Return when everything that was offered so far has been handled."""
        self._queue.join()

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "loradock_tap_dropped",
            "Answered requests that the watcher was too busy to look at, since the server started.",
            value=self.dropped,
        )
        yield CounterMetricFamily(
            "loradock_watcher_seconds",
            "Seconds of CPU that the watcher's thread has used, since the server started.",
            value=self.cpu_seconds,
        )
        yield CounterMetricFamily(
            "loradock_watcher_requests",
            "Requests that the watcher has looked at, since the server started.",
            value=self.handled,
        )

    def _put(self, item: Exchange | Callable[[], None]) -> None:
        if self._thread is None:
            return
        size = item.nbytes if isinstance(item, Exchange) else 0
        with self._counting:
            # One that is larger than the whole queue may come alone.
            if self._queued_bytes and self._queued_bytes + size > self._queue_bytes:
                self.dropped += 1
                return
            try:
                self._queue.put_nowait(item)
                self._queued_bytes += size
            except queue.Full:
                self.dropped += 1

    def _run(self) -> None:
        due = time.monotonic() + self._save_seconds
        while True:
            if time.monotonic() >= due:
                for observer in self._observers:
                    self._guarded(observer.save)
                due = time.monotonic() + self._save_seconds
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            try:
                if item is None:
                    return
                self._handle(item)
            finally:
                if isinstance(item, Exchange):
                    with self._counting:
                        self._queued_bytes -= item.nbytes
                self._queue.task_done()

    def _handle(self, item: Exchange | Callable[[], None]) -> None:
        began = time.thread_time()
        if isinstance(item, Exchange):
            for observer in self._observers:
                self._guarded(observer.observe, item)
        else:
            self._guarded(item)
        self.cpu_seconds += time.thread_time() - began
        self.handled += 1

    def _guarded(self, call: Callable[..., None], *args: Exchange) -> None:
        """One odd request must not end the thread, nor keep the other observers from looking."""
        try:
            call(*args)
        except Exception:
            log.exception("the %s thread failed in %s", self._name, getattr(call, "__qualname__", call))
