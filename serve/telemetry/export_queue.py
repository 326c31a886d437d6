"""Delivers items in batches, in a thread of its own; what a receiver does not take waits and is sent again.

The SDK's own batch processor loses a batch that the collector did not take within its timeout. This one keeps it, until
more wait than may: then the oldest are dropped and counted. A receiver that answered too late may get a batch twice.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

# After the first failure, and at most.
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
# What is left when the server stops may take so long, and a request that was broken off.
FLUSH_SECONDS, CLOSE_SECONDS = 5.0, 1.0


class ExportQueue(Generic[T]):
    """`export` sends items and says whether they were taken; it may block, and `close` must end that.

    `weigh` gives what an item counts for in `size` (of what waits) and `batch`. `delay` in seconds. `put` may be called
    from any thread and never waits for the receiver.
    """

    def __init__(
        self,
        name: str,
        export: Callable[[Sequence[T]], bool],
        close: Callable[[], None],
        *,
        size: int,
        batch: int,
        delay: float,
        weigh: Callable[[T], int] = lambda item: 1,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        self.name = name
        self._export = export
        self._close = close
        self._size = size
        self._batch = batch
        self._delay = delay
        self._weigh = weigh
        self._pause = pause
        self._items: deque[T] = deque()
        self._weight = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"otel-{name}", daemon=True)
        # The item that was not taken although it went alone, and how many had been delivered by then.
        self._refused: tuple[T, int] | None = None
        self.delivered = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Items that have not been taken yet."""
        return len(self._items)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: T) -> None:
        """Have it delivered."""
        with self._changed:
            self._items.append(item)
            self._weight += self._weigh(item)
            self._make_room()
            if self._weight >= self._batch:
                self._changed.notify()

    def ask_to_stop(self) -> None:
        """Deliver what waits at once, and then no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, seconds: float = FLUSH_SECONDS) -> None:
        """Deliver what waits, if the receiver takes it within so many seconds; drop the rest."""
        self.ask_to_stop()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._close()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        before = self.dropped
        self.dropped += len(self._items)
        self._items.clear()
        if self.dropped > before:
            log.warning("%d %s were not delivered before the end", self.dropped - before, self.name)

    def _run(self) -> None:
        most, pause = self._batch, 0.0
        while self._wait(most, pause):
            items = self._take(most)
            if not items:
                continue
            if self._sent(items):
                if pause:
                    log.info("the collector takes %s again; %d wait", self.name, self.waiting)
                most, pause = min(2 * most, self._batch), 0.0
                continue
            if self._stopping:
                self.dropped += len(items)
                return
            self._keep(items)
            if not pause:
                log.warning("the collector does not take %s: they wait and are sent again", self.name)
            # It may be one of them, or too much at once.
            most = max(1, most // 2)
            pause = min(2 * pause, MAX_PAUSE_SECONDS) or self._pause

    def _wait(self, most: int, pause: float) -> bool:
        """Until there is something to send; False when all is sent and no more comes."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._stopping, pause)
            else:
                self._changed.wait_for(lambda: self._stopping or self._weight >= most, self._delay)
            return bool(self._items) or not self._stopping

    def _take(self, most: int) -> list[T]:
        with self._changed:
            items: list[T] = []
            weight = 0
            while self._items and (not items or weight + self._weigh(self._items[0]) <= most):
                items.append(self._items.popleft())
                weight += self._weigh(items[-1])
            self._weight -= weight
            return items

    def _sent(self, items: Sequence[T]) -> bool:
        try:
            taken = self._export(items)
        except Exception:  # an exporter's own defect is no reason to lose the rest
            log.exception("%s were not sent", self.name)
            taken = False
        self.delivered += len(items) if taken else 0
        return taken

    def _keep(self, items: list[T]) -> None:
        """In the order in which they came. One that is refused alone lets the others go first, and goes if they do."""
        with self._changed:
            if len(items) > 1:
                self._items.extendleft(reversed(items))
            elif self._refused and self._refused[0] is items[0] and self.delivered > self._refused[1]:
                self._refused = None
                self.dropped += 1
                return
            else:
                self._refused = (items[0], self.delivered)
                self._items.append(items[0])
            self._weight += sum(map(self._weigh, items))
            self._make_room()

    def _make_room(self) -> None:
        while self._weight > self._size and len(self._items) > 1:
            self._weight -= self._weigh(self._items.popleft())
            self.dropped += 1
