"""Several servers on one registry: each sees what another has changed before it answers the next request.

A request waits for a look at the registry that began after it came: one small query, shared by all that wait. So
whoever has been answered by a new version, by any server, is never answered by the old one again; and a change that
was acknowledged by one server holds on all. Between requests the registry is looked at twice a second, and what is new
is loaded before somebody asks for it.

While the registry does not answer, requests are answered from what was read last: then nothing can be changed here
either. Where this server alone is cut off, others go on changing things; so each answer, `/ready` and a metric say how
old that is, and beyond `stale_seconds` nothing is answered any more. A name that was not read by then may have been
pushed on another server, so it is a 503 and not a 404.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.registry.registry import Registry, Stamp
from serve.auth.keys import Keys
from serve.errors import EngineUnavailable, LoradockError
from serve.fleet.server_messages import ServerMessages
from serve.rollout.lifecycle import Lifecycle

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# A look that takes longer is not waited for. That is seen in so many parts: a server that stood still itself, for
# however long, loses one of them, and finds the answer in the next.
LOOK_SECONDS, PARTS = 2.0, 4
LATE = "it did not answer in time"


class RegistrySync(Collector):
    """This server's view of a registry that others change too. `poll` runs until it is cancelled.

    `stale_seconds` after the last look that was answered, this server answers nobody any more (0: it goes on).
    """

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        lifecycle: Lifecycle,
        messages: ServerMessages,
        stale_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Why the registry cannot be looked at, while it cannot.
        self._problem = ""
        self._stale_seconds = stale_seconds
        self._clock = clock
        # When the last look began that was answered; by the time of day, for people.
        self._read_at = clock()
        self._read_on = datetime.now(UTC)
        self._is_refusing = False
        self._registry = registry
        self._keys = keys
        self._lifecycle = lifecycle
        self._messages = messages
        # One query at a time, and not behind what other threads do: a database that hangs takes this one alone.
        self._look_thread = ThreadPoolExecutor(1, "registry-look")
        self._stamp = Stamp()
        self._looking: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        # The look that is under way was waited for in vain.
        self._is_late = False
        self._is_closed = False

    @property
    def problem(self) -> str:
        """Since when the registry cannot be looked at, why, and what becomes of requests; "" while it can."""
        if not self._problem:
            return ""
        since = f"the registry cannot be looked at since {self._read_on:%Y-%m-%dT%H:%M:%SZ} ({self._problem})"
        if self._is_too_old:
            return f"{since}: this server answers nobody, for registry_stale_seconds is {self._stale_seconds:g}"
        until = f", for {self._stale_seconds:g} s" if self._stale_seconds else ""
        return f"{since}: answers go on from what was read then{until}"

    @property
    def age(self) -> float | None:
        """Seconds since the registry was read last, while it cannot be looked at."""
        return self._clock() - self._read_at if self._problem else None

    @property
    def _is_too_old(self) -> bool:
        age = self.age
        return age is not None and 0 < self._stale_seconds < age

    def check_age(self) -> None:
        """EngineUnavailable, if what was read last is too old to answer from."""
        if not self._is_too_old:
            return
        if not self._is_refusing:
            log.error("%s", self.problem)
        self._is_refusing = True
        raise EngineUnavailable(f"{self.problem}; ask another server, or retry")

    async def fresh(self) -> None:
        """Returns once every change is seen that was committed before this call, or what was read last has to do."""
        if not self._is_late:
            look = self._next = self._next or asyncio.create_task(self._look(self._looking))
            for _ in range(PARTS):
                done, _ = await asyncio.wait([look], timeout=LOOK_SECONDS / PARTS)
                if done:
                    return
            self._is_late = True
        self._unseen(LATE)

    def doubted(self, error: LoradockError) -> LoradockError:
        """The error that says so, if it is about a name that is unknown here while the registry cannot be looked at."""
        if not self._problem or error.code != "model_not_found":
            return error
        return EngineUnavailable(
            f"{error.message} This server knows no such name, but cannot look at the registry now: retry shortly"
        )

    async def poll(self) -> None:
        """Look at the registry also when nobody asks."""
        while True:
            await self.fresh()
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """Look no more: who still asks is answered from what was read last."""
        self._is_closed = True
        self._look_thread.shutdown(wait=False, cancel_futures=True)

    async def _look(self, before: asyncio.Task[None] | None) -> None:
        """One query, begun when the one before it has ended; and what follows, if it says something new."""
        if before is not None:
            await asyncio.wait([before])
        # Who comes from now on needs a look that begins later.
        self._looking, self._next = asyncio.current_task(), None
        if self._is_closed:
            return
        began_at, began_on = self._clock(), datetime.now(UTC)
        try:
            loop = asyncio.get_running_loop()
            stamp = await loop.run_in_executor(self._look_thread, self._registry.stamp)
            if stamp != self._stamp:
                await loop.run_in_executor(self._look_thread, self._read, stamp)
                if replace(stamp, messages=None) != replace(self._stamp, messages=None):
                    self._lifecycle.adopt()
                if stamp.messages != self._stamp.messages:
                    self._messages.wake()
                self._stamp = stamp
            self._seen(began_at, began_on)
        except LoradockError as error:
            self._unseen(str(error))
        except Exception as error:  # requests wait for this look: they are answered from what was read last
            if not self._problem:
                log.exception("a look at the registry failed")
            self._unseen(f"{type(error).__name__}: {error}")
        finally:
            self._is_late = False

    def _read(self, stamp: Stamp) -> None:
        if stamp.names != self._stamp.names:
            self._registry.refresh()
        if stamp.keys != self._stamp.keys:
            self._keys.refresh()

    def _seen(self, began_at: float, began_on: datetime) -> None:
        if (age := self.age) is not None:
            log.info("the registry is looked at again, after %.0f s", age)
        self._problem, self._is_refusing = "", False
        self._read_at, self._read_on = began_at, began_on

    def _unseen(self, why: str) -> None:
        is_new, self._problem = not self._problem, why
        if is_new:
            log.error("%s", self.problem)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "loradock_registry_unread_seconds",
            "How old what this server knows of the registry is, while it cannot look at it; 0 while it can.",
            value=self.age or 0.0,
        )
