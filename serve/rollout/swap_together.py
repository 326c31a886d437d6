"""A swap of a base model on all servers of a registry at once: nobody answers with the new model before all could.

Who is asked for the swap starts and measures the new engine, and announces it. The others start theirs meanwhile. Once
every one that could is ready, or cannot, the registry names the new model, and each goes over at its next look. The
swap is done when they have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
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
# By then one that was ready has gone over.
OVER_SECONDS = 5.0


class State(StrEnum):
    """How far a server is that follows."""

    STARTING = "starting"
    READY = "ready"
    ASIDE = "aside"  # it does not go over together with the others


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
        """How far this server is in following; None: it has gone over."""
        mine = (followers.c.base == base, followers.c.server == server)
        with self._registry.adding() as connection:
            connection.execute(delete(followers).where(*mine))
            if state is not None:
                connection.execute(insert(followers).values(base=base, server=server, state=state.value))

    def states(self, base: str) -> Mapping[str, str]:
        """How far the servers are that have seen the announcement, by their ids."""
        query = select(followers.c.server, followers.c.state).where(followers.c.base == base)
        with self._registry.reading() as connection:
            return {row.server: row.state for row in connection.execute(query)}


class Leading:
    """The pace of a swap that this server was asked for."""

    def __init__(self, rows: SwapRows, me: str, living: Callable[[], set[str]]) -> None:
        self._rows = rows
        self._me = me
        self._living = living
        # The model that was announced.
        self._model = ""

    async def turn(self, base: Supervisor, model: str) -> None:
        """Returns when all others that could go over with this server are ready to."""
        if not self._others:
            return
        self._model = model
        await asyncio.to_thread(self._rows.announce, base.name, model, self._me)
        began = time.monotonic()
        while (waited := time.monotonic() - began) < PATIENCE_SECONDS:
            states = await self._states(base)
            silent = not self._others <= states.keys() and waited < NOTICED_SECONDS
            if not silent and State.STARTING not in states.values():
                return
            await asyncio.sleep(LOOK_SECONDS)
        log.warning("%s goes over to %s without the servers that are not ready yet", base.name, model)

    async def over(self, base: Supervisor) -> None:
        """The swap is done, on all that were ready to go over, or it failed."""
        if not self._model:
            return
        try:
            if base.model == self._model:
                await self._wait_for_others(base)
        except LoradockError as error:
            log.warning("whether other servers have gone over to %s is not known: %s", self._model, error)
        await _told(self._rows.end, base.name, self._me)

    async def _wait_for_others(self, base: Supervisor) -> None:
        """Until they answer with the new model: whoever is told that the swap is done meets no old one."""
        end = time.monotonic() + OVER_SECONDS
        while State.READY in (await self._states(base)).values() and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)

    @property
    def _others(self) -> set[str]:
        return self._living() - {self._me}

    async def _states(self, base: Supervisor) -> Mapping[str, str]:
        """Of the others that live."""
        states = await asyncio.to_thread(self._rows.states, base.name)
        return {server: state for server, state in states.items() if server in self._others}


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
        self._goes_over = False

    async def turn(self, base: Supervisor, model: str) -> None:
        """Returns when the registry names the new model; Conflict, if it never will."""
        await asyncio.to_thread(self._rows.tell, base.name, self._me, State.READY)
        while True:
            announced = await asyncio.to_thread(self._rows.announced, base.name)
            recorded = await asyncio.to_thread(self._registry.swapped, base.name, base.configured)
            if (recorded or base.configured) == model:
                self._goes_over = True
                return
            if announced != self._announcement or announced.server not in self._living():
                raise Conflict(
                    f"the swap of {base.name} to {model} is not to be: {self._announcement.server} gave it up"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def over(self, base: Supervisor) -> None:
        """It is not waited for any longer."""
        await _told(self._rows.tell, base.name, self._me, None if self._goes_over else State.ASIDE)


async def _told(tell: Callable[..., None], *what: object) -> None:
    """Others find out by themselves, if the registry does not take it: who swaps is one of the servers that live."""
    try:
        await asyncio.shield(asyncio.to_thread(tell, *what))
    except LoradockError as error:
        log.warning("other servers are not told how a swap ended: %s", error)
