"""Several servers on one registry: each sees what another has changed before it answers the next request.

A request waits for a look at the registry that began after it came: one small query, shared by all that wait. So
whoever has been answered by a new version, by any server, is never answered by the old one again; and a change that
was acknowledged by one server holds on all. Between requests the registry is looked at twice a second, and what is new
is loaded before somebody asks for it.

While the registry does not answer, requests are answered from what was read last: then nothing can be changed either.
A name that was not read by then may have been pushed on another server, so it is a 503 and not a 404.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update

from serve.adapters.registry.registry import Registry, Stamp
from serve.adapters.registry.tables import replicas as table
from serve.auth.keys import Keys
from serve.engine.fleet import Fleet
from serve.errors import EngineUnavailable, LoradockError
from serve.rollout.lifecycle import Lifecycle

log = logging.getLogger(__name__)

ID_LENGTH = 64
POLL_SECONDS = 0.5
# A look that takes longer is not waited for.
LOOK_SECONDS = 2.0
BEAT_SECONDS = 1.0
# A replica that said nothing for so long is gone.
GONE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Replica:
    """Who this server is among those that share its registry. A longer id than its column takes ends in its hash."""

    id: str
    node: str

    def __post_init__(self) -> None:
        if len(self.id) > ID_LENGTH:
            ending = hashlib.sha256(self.id.encode()).hexdigest()[:12]
            object.__setattr__(self, "id", f"{self.id[: ID_LENGTH - 13]}-{ending}")


class RegistrySync:
    """This server's view of a registry that others change too. `poll` and `heartbeat` run until they are cancelled."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        lifecycle: Lifecycle,
        fleet: Fleet,
        me: Replica,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.me = me
        # Why the registry cannot be looked at, while it cannot.
        self.problem = ""
        self._registry = registry
        self._keys = keys
        self._lifecycle = lifecycle
        self._fleet = fleet
        self._clock = clock
        # One query at a time each, and not behind what other threads do: a database that hangs takes these two alone.
        self._look_thread = ThreadPoolExecutor(1, "registry-look")
        self._beat_thread = ThreadPoolExecutor(1, "registry-heartbeat")
        self._stamp = Stamp()
        self._looking: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        # When the look that is under way began.
        self._since: float | None = None

    async def fresh(self) -> None:
        """Returns once every change is seen that was committed before this call; it raises nothing."""
        if self._since is not None and time.monotonic() - self._since > LOOK_SECONDS:
            return
        if self._next is None:
            self._next = asyncio.create_task(self._look(self._looking))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await asyncio.shield(self._next)
        except TimeoutError:
            self._unseen("it did not answer in time")

    def doubted(self, error: LoradockError) -> LoradockError:
        """The error that says so, if it is about a name that is unknown here while the registry cannot be looked at."""
        if not self.problem or error.code != "model_not_found":
            return error
        return EngineUnavailable(
            f"{error.message} This server knows no such name, but cannot look at the registry now: retry shortly"
        )

    async def poll(self) -> None:
        """Look at the registry also when nobody asks."""
        while True:
            await self.fresh()
            await asyncio.sleep(POLL_SECONDS)

    async def heartbeat(self) -> None:
        """Tell the registry that this server lives."""
        silent = False
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._beat_thread, self._beat)
                silent = False
            except LoradockError as error:
                if not silent:
                    log.warning("the registry cannot be told that this server lives: %s", error)
                silent = True
            await asyncio.sleep(BEAT_SECONDS)

    async def close(self) -> None:
        """Leave the replicas' table; a registry that does not answer is not waited for."""
        leaving = asyncio.get_running_loop().run_in_executor(self._beat_thread, self._leave)
        done, _ = await asyncio.wait([leaving], timeout=LOOK_SECONDS)
        if not done or leaving.exception():
            log.warning("the registry was not told that this server stops: %s",
                        leaving.exception() if done else "it did not answer in time")  # fmt: skip
        for thread in (self._look_thread, self._beat_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    def replicas(self) -> list[dict[str, Any]]:
        """Those that share the registry and were heard of lately. Blocks."""
        with self._registry.reading() as connection:
            rows = connection.execute(select(table).order_by(table.c.id)).mappings().all()
        latest = self._registry.generation
        return [
            {
                "object": "replica",
                "id": row["id"],
                "node": row["node"],
                "phase": row["phase"],
                "generation": row["generation"],
                "behind": max(0, latest - row["generation"]),
                "seen_seconds_ago": round(max(0.0, self._clock() - row["seen"]), 1),
                "me": row["id"] == self.me.id,
            }
            for row in rows
            if self._clock() - row["seen"] < GONE_SECONDS
        ]

    async def _look(self, before: asyncio.Task[None] | None) -> None:
        """One query, begun when the one before it has ended; and what follows, if it says something new."""
        if before is not None:
            await asyncio.wait([before])
        # Who comes from now on needs a look that begins later.
        self._looking, self._next = asyncio.current_task(), None
        self._since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            stamp = await loop.run_in_executor(self._look_thread, self._registry.stamp)
            if stamp != self._stamp:
                await loop.run_in_executor(self._look_thread, self._read, stamp)
                self._lifecycle.adopt()
                self._stamp = stamp
            if self.problem:
                log.info("the registry is looked at again")
            self.problem = ""
        except LoradockError as error:
            self._unseen(str(error))
        except Exception as error:  # requests wait for this look: they are answered from what was read last
            if not self.problem:
                log.exception("a look at the registry failed")
            self._unseen(f"{type(error).__name__}: {error}")
        finally:
            self._since = None

    def _read(self, stamp: Stamp) -> None:
        if stamp.names != self._stamp.names:
            self._registry.refresh()
        if stamp.keys != self._stamp.keys:
            self._keys.refresh()

    def _unseen(self, why: str) -> None:
        if not self.problem:
            log.error("the registry cannot be looked at, answers go on from what was read last: %s", why)
        self.problem = why

    def _beat(self) -> None:
        now = self._clock()
        row = {
            "node": self.me.node,
            "phase": str(self._fleet.first.phase),
            "generation": self._registry.generation,
            "seen": now,
        }
        with self._registry.adding() as connection:  # it waits for no change that is under way
            if not connection.execute(update(table).where(table.c.id == self.me.id).values(**row)).rowcount:
                connection.execute(insert(table).values(id=self.me.id, **row))
            connection.execute(delete(table).where(table.c.seen < now - 60 * GONE_SECONDS))

    def _leave(self) -> None:
        with self._registry.transaction() as connection:
            connection.execute(delete(table).where(table.c.id == self.me.id))
