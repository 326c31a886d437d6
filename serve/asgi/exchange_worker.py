"""Shows finished exchanges to observers, in one thread behind a bounded queue.

The event loop offers an exchange and never waits: while the queue is full, exchanges are dropped and counted. An
exchange holds the tokens of its prompt, so the queue is bounded in bytes too.

Exchanges are looked at some at a time: a thread that wakes for each one takes the processor from the engine as often,
and finds nothing of its own in the caches. In between, some thousand times a second, the event loop gets its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
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
# An exchange waits so long for others, unless the queue is half full. Beside an engine that needs the caches itself, a
# thread that wakes once a second takes little more than half as much for each as one that wakes five times.
LINGER_SECONDS = 1.0
# For so long the thread goes on to the next exchange without giving the interpreter away.
TURN_SECONDS = 0.0003


class Observer(Protocol):
    """Looks at exchanges. `start` runs before the worker's thread, `stop` after it, all else in it."""

    def start(self) -> None:
        """Read what was saved, before the first exchange."""

    def observe(self, exchange: Exchange) -> None:
        """Look at one finished exchange."""

    def looked(self) -> None:
        """All that waited has been looked at: do what is cheaper for all of them together."""

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
        linger: float = LINGER_SECONDS,
    ) -> None:
        self._observers = tuple(observers)
        self._name = name
        self._save_seconds = save_seconds
        self._linger = linger
        # With the bytes of each. The event loop puts, the thread takes, and each has counters of its own.
        self._items: deque[tuple[Exchange | Callable[[], None] | None, int]] = deque()
        self._queue_size, self._queue_bytes = queue_size, queue_bytes
        self._offered = self._offered_bytes = self._done = self._done_bytes = 0
        # There is something to look at; and it is to be looked at now.
        self._awake, self._hurry = threading.Event(), threading.Event()
        self._looked = threading.Condition()
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
        self._append(None, 0)
        self._hurry.set()
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
        offered = self._offered
        self._hurry.set()
        with self._looked:
            self._looked.wait_for(lambda: self._done >= offered)

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
        waiting = self._offered_bytes - self._done_bytes
        queued, nbytes = len(self._items) + 1, waiting + size
        # One that is larger than the whole queue may come alone.
        if queued > self._queue_size or (waiting and nbytes > self._queue_bytes):
            self.dropped += 1
            return
        self._append(item, size)
        if 2 * queued >= self._queue_size or 2 * nbytes >= self._queue_bytes:
            self._hurry.set()

    def _append(self, item: Exchange | Callable[[], None] | None, size: int) -> None:
        self._offered += 1
        self._offered_bytes += size
        self._items.append((item, size))
        if not self._awake.is_set():
            self._awake.set()

    def _run(self) -> None:
        due, goes_on = time.monotonic() + self._save_seconds, True
        while goes_on:
            if self._awake.wait(max(0.0, due - time.monotonic())):
                self._hurry.wait(self._linger)
                self._hurry.clear()
                self._awake.clear()  # before it looks: what comes from now on wakes it again
                goes_on = self._look(len(self._items))
            if goes_on and time.monotonic() >= due:
                for observer in self._observers:
                    self._guarded(observer.save)
                due = time.monotonic() + self._save_seconds

    def _look(self, count: int) -> bool:
        """Look at so many; False at the end of all."""
        began = time.thread_time()
        goes_on = True
        turn = time.perf_counter() + TURN_SECONDS
        for _ in range(count):
            if time.perf_counter() > turn:
                time.sleep(0)  # whoever waits for the interpreter has it first
                turn = time.perf_counter() + TURN_SECONDS
            item, size = self._items.popleft()
            if item is None:
                goes_on = False
            elif isinstance(item, Exchange):
                for observer in self._observers:
                    self._guarded(observer.observe, item)
            else:
                self._guarded(item)
            self.handled += item is not None
            self._done_bytes += size
        for observer in self._observers:
            self._guarded(observer.looked)
        self.cpu_seconds += time.thread_time() - began
        with self._looked:
            self._done += count
            self._looked.notify_all()
        return goes_on

    def _guarded(self, call: Callable[..., None], *args: Exchange) -> None:
        """One odd request must not end the thread, nor keep the other observers from looking."""
        try:
            call(*args)
        except Exception:
            log.exception("the %s thread failed in %s", self._name, getattr(call, "__qualname__", call))


class DroppedExchanges(Collector):
    """What workers beside the watcher had no room for, by their names. An exchange counts, and a rating."""

    def __init__(self, **workers: ExchangeWorker) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily(
            "loradock_exchanges_dropped",
            "Answered requests and ratings that a worker beside the watcher was too busy to take, since the server "
            "started: capture keeps them to learn from, data_quality counts what is wrong with them.",
            labels=["worker"],
        )
        for name, worker in self._workers.items():
            dropped.add_metric([name], worker.dropped)
        yield dropped
