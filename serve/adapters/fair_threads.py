"""Threads for work that blocks, with a turn for each tenant.

It is the event loop's default executor, so whatever waits in `asyncio.to_thread` waits here: a tenant that asks for a
thousand lists takes half of the threads at most, and the next tenant's question is the next one of the others. Work of
the server itself has no tenant, and no bound. What is cancelled before its turn is never begun.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Whose work this is. A key's tenant while its request is answered; None for the server's own.
TENANT: ContextVar[str | None] = ContextVar("tenant", default=None)


@contextmanager
def in_the_name_of(tenant: str) -> Iterator[None]:
    """What is begun in the block is this tenant's."""
    token = TENANT.set(tenant)
    try:
        yield
    finally:
        TENANT.reset(token)


class FairThreads(ThreadPoolExecutor):
    """`threads` run at a time, of one tenant half of them (at least one)."""

    def __init__(self, threads: int, name: str = "blocking") -> None:
        super().__init__(threads, name)
        self._most, self._share = threads, max(1, threads // 2)
        self._changed = threading.Condition()
        # Tenants in the order of their turns, each with what it waits for.
        self._waiting: OrderedDict[str | None, deque[Callable[[], None]]] = OrderedDict()
        self._running: Counter[str | None] = Counter()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **named: P.kwargs) -> Future[T]:
        tenant, future = TENANT.get(), Future[T]()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = fn(*args, **named)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        with self._changed:
            self._waiting.setdefault(tenant, deque()).append(run)
            self._begin()
        return future

    def _begin(self) -> None:
        """As much as may run, each tenant in its turn."""
        while sum(self._running.values()) < self._most:
            next_ones = [tenant for tenant in self._waiting if tenant is None or self._running[tenant] < self._share]
            if not next_ones:
                return
            tenant = next_ones[0]
            run = self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            self._running[tenant] += 1
            super().submit(self._run, tenant, run)

    def _run(self, tenant: str | None, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            with self._changed:
                self._running[tenant] -= 1
                if not self._running[tenant]:
                    del self._running[tenant]
                self._begin()
                self._changed.notify_all()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """What waits is begun first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
        super().shutdown(wait, cancel_futures=cancel_futures)
