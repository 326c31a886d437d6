"""Servers of one registry say once a second that they live, and each decides here, alone, which of the others do.

Each writes a row of its own and reads those of the others. Nobody compares clocks: a server whose row has not changed
for some reads in a row is gone. While the registry does not answer, everybody goes on with what was read last.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import delete, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import replicas as table
from serve.errors import LoradockError

log = logging.getLogger(__name__)

ID_LENGTH = 64
BEAT_SECONDS = 1.0
# Reads in which the row of a server stays the same before it is gone, and before the row is.
MISSED, FORGOTTEN = 5, 600
# A registry that does not answer is not waited for when the server stops.
LEAVE_SECONDS = 2.0

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ThisServer:
    """Who this server is among those of its registry. A longer id than its column takes ends in its hash."""

    id: str
    node: str

    def __post_init__(self) -> None:
        if len(self.id) > ID_LENGTH:
            ending = hashlib.sha256(self.id.encode()).hexdigest()[:12]
            object.__setattr__(self, "id", f"{self.id[: ID_LENGTH - 13]}-{ending}")


class Listener(Protocol):
    """Who has more to tell with each beat, and hears what the others tell."""

    def told(self) -> dict[str, Any]:
        """Columns of this server's row."""
        ...

    def hear(self, others: Sequence[Row]) -> None:
        """The rows of the other servers that live."""
        ...


@dataclass(slots=True)
class _Heard:
    """A row as it was read last, when it changed by the monotonic clock, and in how many reads it has not since.

    A row that was there before this server came is believed once it changes.
    """

    row: Row
    changed: float
    unchanged: int = 0
    is_believed: bool = True

    @property
    def lives(self) -> bool:
        return self.is_believed and self.unchanged < MISSED


class Heartbeat:
    """`run` tells and hears until it is cancelled. `phase` is how far this server is."""

    def __init__(self, registry: Registry, me: ThisServer, phase: Callable[[], str], *listeners: Listener) -> None:
        self.me = me
        self._registry = registry
        self._phase = phase
        self._listeners = listeners
        # A registry that hangs takes this thread alone.
        self._thread = ThreadPoolExecutor(1, "registry-heartbeat")
        self._heard: dict[str, _Heard] = {}

    async def run(self) -> None:
        silent = False
        while True:
            try:
                await self.beat()
                silent = False
            except LoradockError as error:
                if not silent:
                    log.warning("the registry cannot be told that this server lives, nor say who does: %s", error)
                silent = True
            await asyncio.sleep(BEAT_SECONDS)

    async def beat(self) -> None:
        """Write this server's row, and take in those of the others."""
        row: dict[str, Any] = {
            "node": self.me.node,
            "phase": self._phase(),
            "generation": self._registry.generation,
        }
        for listener in self._listeners:
            row |= listener.told()
        gone = [id for id, heard in self._heard.items() if heard.unchanged >= FORGOTTEN]
        rows = await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, row, gone)
        self._take(rows)

    async def close(self) -> None:
        """Leave the others; a registry that does not answer is not waited for."""
        leaving = asyncio.get_running_loop().run_in_executor(self._thread, self._leave)
        done, _ = await asyncio.wait([leaving], timeout=LEAVE_SECONDS)
        if not done or leaving.exception():
            log.warning("the registry was not told that this server stops: %s",
                        leaving.exception() if done else "it did not answer in time")  # fmt: skip
        self._thread.shutdown(wait=False, cancel_futures=True)

    def living_ids(self) -> set[str]:
        """The servers that live, this one too."""
        return {id for id, heard in self._heard.items() if heard.lives}

    def living(self) -> list[dict[str, Any]]:
        """The servers that live, this one too, as the API describes them."""
        latest = self._registry.generation
        now = time.monotonic()
        return [
            {
                "object": "replica",
                "id": id,
                "node": heard.row["node"],
                "phase": heard.row["phase"],
                "generation": heard.row["generation"],
                "behind": max(0, latest - heard.row["generation"]),
                "seen_seconds_ago": round(now - heard.changed, 1),
                "me": id == self.me.id,
            }
            for id, heard in sorted(self._heard.items())
            if heard.lives
        ]

    def _exchange(self, row: Row, gone: Sequence[str]) -> list[dict[str, Any]]:
        with self._registry.adding() as connection:  # it waits for no change that is under way
            # The time of day is told for people, and for releases that compare it; here it counts that it changes.
            values = {**row, "seen": time.time()}
            if not connection.execute(update(table).where(table.c.id == self.me.id).values(**values)).rowcount:
                connection.execute(insert(table).values(id=self.me.id, **values))
            for id in gone:
                same = table.c.seen == self._heard[id].row["seen"]
                connection.execute(delete(table).where(table.c.id == id, same))
        # What this server tells nothing of, it does not listen to.
        query = select(table.c.id, *(table.c[name] for name in values))
        with self._registry.reading() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _leave(self) -> None:
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.id == self.me.id))

    def _take(self, rows: Sequence[Row]) -> None:
        self._heard = {row["id"]: self._read(row) for row in rows}
        others = [heard.row for id, heard in self._heard.items() if heard.lives and id != self.me.id]
        for listener in self._listeners:
            listener.hear(others)

    def _read(self, row: Row) -> _Heard:
        before = self._heard.get(row["id"])
        if before is not None and before.row["seen"] == row["seen"]:
            return _Heard(row, before.changed, before.unchanged + 1, before.is_believed)
        return _Heard(row, time.monotonic(), is_believed=before is not None or row["id"] == self.me.id)
