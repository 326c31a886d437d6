"""A swap of a base model on all servers of a registry at once: nobody answers with the new model before all could.

Who is asked for the swap starts and measures the new engine, and announces it. The others start theirs meanwhile. Once
every one that could is ready, or cannot, the registry names the new model, and each goes over at its next look.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import delete, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import swap_announcements as announcements
from serve.adapters.registry.tables import swap_followers as followers
from serve.engine.supervisor import Supervisor
from serve.errors import Conflict, LoradockError

log = logging.getLogger(__name__)

# Between two looks at how far the others are.
LOOK_SECONDS = 0.25
# By then a server that follows has said so, and by then it is not waited for any longer.
NOTICED_SECONDS, PATIENCE_SECONDS = 3.0, 900.0


class State(StrEnum):
    """How far a server is that follows."""

    STARTING = "starting"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Announcement:
    """A swap that is about to be."""

    model: str
    server: str
    when: float


class SwapRows:
    """What servers tell one another of swaps. All of it blocks."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock

    def announced(self, base: str) -> Announcement | None:
        """The swap of this base that is about to be."""
        table = announcements.c
        with self._registry.reading() as connection:
            query = select(table.model, table.server, table.when).where(table.base == base)
            row = connection.execute(query).first()
        return Announcement(*row) if row else None

    def announce(self, base: str, model: str, server: str) -> None:
        """This server is about to swap; what was told of an earlier one is forgotten."""
        with self._registry.adding() as connection:
            for table in (announcements, followers):
                connection.execute(delete(table).where(table.c.base == base))
            row = {"base": base, "model": model, "server": server, "when": self._clock()}
            connection.execute(insert(announcements).values(row))

    def end(self, base: str, server: str) -> None:
        """This server's swap is over, or is not to be."""
        mine = (announcements.c.base == base, announcements.c.server == server)
        with self._registry.adding() as connection:
            connection.execute(delete(announcements).where(*mine))

    def tell(self, base: str, server: str, state: State | None) -> None:
        """How far this server is in following; None: it does not follow, or no longer."""
        mine = (followers.c.base == base, followers.c.server == server)
        with self._registry.adding() as connection:
            connection.execute(delete(followers).where(*mine))
            if state is not None:
                connection.execute(insert(followers).values(base=base, server=server, state=state.value))

    def starting(self, base: str) -> Sequence[str]:
        """The servers whose engine over the new model is not ready yet."""
        query = select(followers.c.server).where(followers.c.base == base, followers.c.state == State.STARTING.value)
        with self._registry.reading() as connection:
            return list(connection.scalars(query))


class Leading:
    """The pace of a swap that this server was asked for."""

    def __init__(self, rows: SwapRows, me: str, living: Callable[[], set[str]]) -> None:
        self._rows = rows
        self._me = me
        self._living = living
        self._is_announced = False

    async def turn(self, base: Supervisor, model: str) -> None:
        """Returns when all others that could go over with this server are ready to."""
        others = self._living() - {self._me}
        if not others:
            return
        self._is_announced = True
        await asyncio.to_thread(self._rows.announce, base.name, model, self._me)
        began = time.monotonic()
        while (waited := time.monotonic() - began) < PATIENCE_SECONDS:
            starting = set(await asyncio.to_thread(self._rows.starting, base.name)) & self._living()
            if not starting and waited >= NOTICED_SECONDS:
                return
            await asyncio.sleep(LOOK_SECONDS)
        log.warning("%s goes over to %s without the servers that are not ready yet", base.name, model)

    async def over(self, base: Supervisor) -> None:
        """The swap is done, or failed."""
        if self._is_announced:
            await _told(self._rows.end, base.name, self._me)


class Following:
    """The pace of a swap that another server has announced."""

    def __init__(
        self, rows: SwapRows, registry: Registry, me: str, announcement: Announcement, living: Callable[[], set[str]]
    ) -> None:
        self._rows = rows
        self._registry = registry
        self._me = me
        self._announcement = announcement
        self._living = living

    async def turn(self, base: Supervisor, model: str) -> None:
        """Returns when the registry names the new model; Conflict, if it never will."""
        await asyncio.to_thread(self._rows.tell, base.name, self._me, State.READY)
        while True:
            announced = await asyncio.to_thread(self._rows.announced, base.name)
            recorded = await asyncio.to_thread(self._registry.swapped, base.name, base.configured)
            if (recorded or base.configured) == model:
                return
            if announced != self._announcement or announced.server not in self._living():
                raise Conflict(
                    f"the swap of {base.name} to {model} is not to be: {self._announcement.server} gave it up"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def over(self, base: Supervisor) -> None:
        """It is not waited for any longer."""
        await _told(self._rows.tell, base.name, self._me, None)


async def _told(tell: Callable[..., None], *what: object) -> None:
    """Others find out by themselves, if the registry does not take it: who swaps is one of the servers that live."""
    try:
        await asyncio.shield(asyncio.to_thread(tell, *what))
    except LoradockError as error:
        log.warning("other servers are not told how a swap ended: %s", error)
