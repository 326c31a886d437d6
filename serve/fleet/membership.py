"""The servers of one registry tell each other, once a second, where they are and how much they have to do.

Each writes a row of its own and reads those of the others. Nobody compares clocks: a server whose row has not changed
for some reads in a row is gone. While the registry does not answer, everybody goes on with what was read last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import delete, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import fleet as table
from serve.errors import LoradockError
from serve.fleet.demand import Rates
from serve.fleet.homes import Replica, number
from serve.fleet.placement import Placement

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
# Reads in which the row of a server stays the same before it is gone.
MISSED = 5
# A server that could not be reached is asked again after so long.
UNREACHABLE_SECONDS = 5.0
# Adapters that a server tells of, the latest used first.
TOLD_ADAPTERS = 1024
# A registry that does not answer is not waited for when the server stops.
LEAVE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself. `load` are the requests of clients that it works on, `held` the names of the
    adapters that are loaded, the latest used first."""

    slots: int
    max_rank: int
    load: float
    held: Sequence[str] = ()


class Here(Protocol):
    """What this server knows of itself."""

    @property
    def load(self) -> float: ...
    @property
    def seats(self) -> float: ...
    def report(self) -> Report | None: ...


@dataclass(slots=True, eq=False)
class Peer:
    """Another server, as it was told of last."""

    id: str
    address: str
    load: float = 0.0
    # Requests that were sent there since it said how much it has to do.
    sent: int = 0
    unreachable_until: float = 0.0
    # Called when it is gone.
    alarms: set[Callable[[], object]] = field(default_factory=set)

    def hear(self, address: str, load: float) -> None:
        """It has said where it is, and how much it has to do."""
        self.address = address
        self.load = load
        self.sent = 0

    def begin(self) -> None:
        """A request is sent there."""
        self.sent += 1

    def leave_alone(self, until: float) -> None:
        """It could not be reached, or does not serve now."""
        self.unreachable_until = until


class Membership:
    """This server among its fleet. `here` reports how it is now, None while it answers nobody. For one event loop.

    `address` is where others reach it, `bases` the names of what it serves: with a server that serves anything else it
    shares no homes.
    """

    def __init__(
        self,
        registry: Registry,
        me: str,
        address: str,
        bases: Sequence[str],
        here: Here,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self.address = address
        self._registry = registry
        self._bases = json.dumps(sorted(bases))
        self._here = here
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "fleet")
        self._placement = Placement(clock())
        self._peers: dict[str, Peer] = {}
        self._holders: dict[int, list[int]] = {}
        self._places: list[Peer | None] = []
        # The beat of each row when it was read last, and how many reads ago it changed.
        self._beats: dict[str, tuple[int, int]] = {}
        self._beat = 0

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The other servers that live."""
        return tuple(self._peers.values())

    async def run(self) -> None:
        """Tell and hear, until cancelled."""
        silent = False
        while True:
            try:
                await self.exchange()
                silent = False
            except LoradockError as error:
                if not silent:
                    log.warning("the other servers of the fleet cannot be heard of: %s", error)
                silent = True
            await asyncio.sleep(BEAT_SECONDS)

    async def exchange(self) -> None:
        """Write this server's row, and take in those of the others."""
        report, own = self._here.report(), self._placement.own
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._thread, self._swap, report, own)
        self._take(rows, report)

    async def close(self) -> None:
        """Leave the fleet."""
        leaving = asyncio.get_running_loop().run_in_executor(self._thread, self._leave)
        done, _ = await asyncio.wait([leaving], timeout=LEAVE_SECONDS)
        if not done or leaving.exception():
            log.warning("the fleet was not told that this server stops")
        self._thread.shutdown(wait=False, cancel_futures=True)

    def route(self, name: str, rank: int) -> Peer | None:
        """Who is to answer a request of a client for an adapter of this rank; None: this server."""
        placement = self._placement
        placement.count(name)
        if not self._peers:
            return None
        load = self._here.load
        loads = [load if peer is None else peer.load + peer.sent for peer in self._places]
        holders = self._holders.get(_mark(name), ())
        now = self._clock()
        *better, _ = placement.ranks(name, loads, now, rank, holders)
        for places in better:
            if any(self._places[place] is None for place in places):
                return None
            reachable = [place for place in places if self._reachable(place, now)]
            if reachable:
                return self._places[min(reachable, key=loads.__getitem__)]
        return None

    def is_home(self, name: str, rank: int) -> bool:
        """Whether this server is a home of the adapter; of every one, while no other lives."""
        if not self._peers:
            return True
        return any(self._places[place] is None for place in self._placement.homes(name, rank))

    def failed(self, peer: Peer) -> None:
        """It could not be reached, or does not serve now."""
        if not peer.unreachable_until:
            log.warning("%s at %s takes no requests that are sent on: they are answered here", peer.id, peer.address)
        peer.leave_alone(self._clock() + UNREACHABLE_SECONDS)

    def answered(self, peer: Peer) -> None:
        """It took a request."""
        if peer.unreachable_until:
            log.info("%s takes requests again", peer.id)
            peer.leave_alone(0.0)

    def _reachable(self, place: int, now: float) -> bool:
        peer = self._places[place]
        return peer is not None and peer.unreachable_until <= now

    def _swap(self, report: Report | None, own: Rates) -> list[Mapping[str, Any]]:
        """In a thread of its own: a registry that hangs takes this one alone."""
        self._beat += 1
        with self._registry.adding() as connection:
            if report is None:
                connection.execute(delete(table).where(table.c.id == self.me))
            else:
                row = {
                    "address": self.address,
                    "bases": self._bases,
                    "slots": report.slots,
                    "max_rank": report.max_rank,
                    "load": report.load,
                    "held": json.dumps([_mark(name) for name in report.held[:TOLD_ADAPTERS]]),
                    "total": own.total,
                    "rates": json.dumps({name: round(rate, 4) for name, rate in own.names.items()}),
                    "beat": self._beat,
                }
                if not connection.execute(update(table).where(table.c.id == self.me).values(**row)).rowcount:
                    connection.execute(insert(table).values(id=self.me, **row))
        with self._registry.reading() as connection:
            query = select(table).where(table.c.bases == self._bases)
            return [dict(row) for row in connection.execute(query).mappings()]

    def _leave(self) -> None:
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.id == self.me))

    def _take(self, rows: Sequence[Mapping[str, Any]], report: Report | None) -> None:
        others = {row["id"]: row for row in rows if row["id"] != self.me and self._lives(row)}
        self._beats = {id: beat for id, beat in self._beats.items() if id in {row["id"] for row in rows}}
        for id in self._peers.keys() - others.keys():
            gone = self._peers.pop(id)
            log.info("the server %s has left the fleet", id)
            for alarm in tuple(gone.alarms):
                alarm()
        for id, row in others.items():
            self._peers.setdefault(id, Peer(id, row["address"])).hear(row["address"], row["load"])
        members = [Replica(id, row["slots"], row["max_rank"]) for id, row in others.items()]
        if report:
            members.append(Replica(self.me, report.slots, report.max_rank))
        self._placement.resize(self._here.seats)
        self._placement.see(members)
        self._placement.hear({id: Rates(row["total"], json.loads(row["rates"])) for id, row in others.items()})
        self._places = [self._peers.get(member.id) for member in self._placement.members]
        self._holders = self._held(others, report)

    def _lives(self, row: Mapping[str, Any]) -> bool:
        """Its row has changed of late."""
        # A row that was there before this server came is believed once it changes.
        beat, unchanged = self._beats.get(row["id"], (row["beat"], MISSED))
        unchanged = 0 if row["beat"] != beat else unchanged + 1
        self._beats[row["id"]] = row["beat"], unchanged
        return unchanged < MISSED

    def _held(self, others: Mapping[str, Mapping[str, Any]], report: Report | None) -> dict[int, list[int]]:
        """Which places hold an adapter, by its mark."""
        holders: defaultdict[int, list[int]] = defaultdict(list)
        for place, member in enumerate(self._placement.members):
            if member.id in others:
                marks: Sequence[int] = json.loads(others[member.id]["held"])
            else:
                marks = [_mark(name) for name in report.held] if report else []
            for mark in marks:
                holders[mark].append(place)
        return dict(holders)


def _mark(name: str) -> int:
    """A name in 32 bits: of two that share one, a request goes to somebody who has to load it."""
    return number(name) & 0xFFFFFFFF
