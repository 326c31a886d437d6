"""What only one server of a registry can do, asked through any of them: the one that gave an answer has it rated.

A server that knows nothing of a subject writes a message into the registry. Every other one reads it within half a
second, and the one that knows the subject does what is asked and answers in the same row. Nobody needs an address of
anybody. Each beat tells how far a server has read: when all that live have, and none has answered, there is nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import delete, func, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import server_messages as table
from serve.errors import EngineUnavailable, LoradockError, Overloaded
from serve.fleet.heartbeat import Row

log = logging.getLogger(__name__)

# A server reads within a poll of the registry, says so with its next beat, and is heard with ours.
WAIT_SECONDS = 6.0
LOOK_SECONDS = 0.1
# Messages of this server that wait for an answer at a time.
MOST = 64
# Those of a server that died meanwhile go after so long, whatever its clock said.
KEPT_SECONDS = 3600.0
# A message that somebody has taken, and not answered yet.
TAKEN = ""

Content = Mapping[str, Any]
Claim = Callable[[], Awaitable[bool]]


class Reader(Protocol):
    async def __call__(self, content: Content, claim: Claim) -> Content | None:
        """Do what is asked, and what to answer; None, if this server knows nothing of it.

        What must not be done twice is done once `claim` says that no other server does it.
        """


class ServerMessages:
    """`me` is this server. `readers` say what the messages of each kind ask; they are heard from `run` on."""

    def __init__(self, registry: Registry, me: str, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._me = me
        self._clock = clock
        self._readers: dict[str, Reader] = {}
        self._new = asyncio.Event()
        self._waiting = 0
        # The last message that was read here, and by each other server that lives.
        self._read = 0
        self._others: dict[str, int] = {}

    # With each beat

    def told(self) -> dict[str, Any]:
        """The column of this server's row."""
        return {"messages_read": self._read}

    def hear(self, others: Sequence[Row]) -> None:
        """The rows of the other servers that live; one of an earlier release reads nothing."""
        self._others = {row["id"]: row["messages_read"] for row in others if row["messages_read"] is not None}

    # Asking

    async def ask(self, kind: str, content: Content) -> Content | None:
        """What the server answers that knows of it; None, if no other one does.

        EngineUnavailable, if not all of them have looked in time; Overloaded.
        """
        if not self._others:
            return None
        if self._waiting >= MOST:
            raise Overloaded(f"{MOST} requests wait for other servers already; retry shortly", retry_after=1)
        self._waiting += 1
        try:
            number = await asyncio.to_thread(self._write, kind, json.dumps(content))
            try:
                return await self._answer_to(number)
            finally:
                await asyncio.shield(asyncio.to_thread(self._forget, number))
        finally:
            self._waiting -= 1

    async def _answer_to(self, number: int) -> Content | None:
        end = time.monotonic() + WAIT_SECONDS
        while True:
            have_all_read = all(read >= number for read in self._others.values())
            # Each answers before it tells that it has read.
            if answer := await asyncio.to_thread(self._answer, number):
                return dict(json.loads(answer))
            if have_all_read:
                return None
            if time.monotonic() > end:
                raise EngineUnavailable("not every server has looked for what this is about; retry shortly")
            await asyncio.sleep(LOOK_SECONDS)

    # Reading

    def read_by(self, kind: str, reader: Reader) -> None:
        """This one reads the messages of a kind."""
        self._readers[kind] = reader

    def wake(self) -> None:
        """There may be new messages."""
        self._new.set()

    async def run(self) -> None:
        """Read what other servers ask, until cancelled."""
        while True:
            await self._new.wait()
            self._new.clear()
            try:
                await self._read_new()
            except LoradockError as error:
                log.warning("what other servers ask is not known now: %s", error)
                self._new.set()
                await asyncio.sleep(1.0)

    async def _read_new(self) -> None:
        for number, sender, kind, content in await asyncio.to_thread(self._later, self._read):
            reader = self._readers.get(kind)
            if sender != self._me and reader is not None:
                await self._take(number, reader, json.loads(content))
            self._read = number

    async def _take(self, number: int, reader: Reader, content: Content) -> None:
        async def claim() -> bool:
            return await asyncio.to_thread(self._claim, number)

        try:
            answer = await reader(content, claim)
        except LoradockError as error:
            log.warning("what another server asked was not done: %s", error)
            return
        if answer is not None:
            await asyncio.to_thread(self._set_answer, number, json.dumps(answer))

    # The table. All of it blocks

    def pending(self) -> int:
        """Messages of any server that are not done."""
        with self._registry.reading() as connection:
            return connection.scalar(select(func.count(table.c.id))) or 0

    def _write(self, kind: str, content: str) -> int:
        now = self._clock()
        row = {"sender": self._me, "kind": kind, "content": content, "when": now}
        # One after the other, so that numbers rise in the order in which others can read them.
        with self._registry.adding(table.name) as connection:
            connection.execute(delete(table).where(table.c.when < now - KEPT_SECONDS))
            return connection.execute(insert(table).values(**row).returning(table.c.id)).scalar_one()

    def _later(self, number: int) -> list[tuple[int, str, str, str]]:
        columns = (table.c.id, table.c.sender, table.c.kind, table.c.content)
        with self._registry.reading() as connection:
            rows = connection.execute(select(*columns).where(table.c.id > number).order_by(table.c.id))
            return [tuple(row) for row in rows]

    def _claim(self, number: int) -> bool:
        free = (table.c.id == number) & table.c.answer.is_(None)
        with self._registry.adding() as connection:
            return bool(connection.execute(update(table).where(free).values(answer=TAKEN)).rowcount)

    def _set_answer(self, number: int, answer: str) -> None:
        with self._registry.adding() as connection:
            connection.execute(update(table).where(table.c.id == number).values(answer=answer))

    def _answer(self, number: int) -> str | None:
        with self._registry.reading() as connection:
            return connection.scalar(select(table.c.answer).where(table.c.id == number))

    def _forget(self, number: int) -> None:
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.id == number))
