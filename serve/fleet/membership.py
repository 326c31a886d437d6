"""The servers of one registry tell each other, with each heartbeat, where they are and how much they have to do."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from serve.fleet.demand import Rates
from serve.fleet.heartbeat import Row
from serve.fleet.homes import Replica, mark
from serve.fleet.placement import Placement
from serve.fleet.routed import Stats

log = logging.getLogger(__name__)

# A server that could not be reached is asked again after so long.
UNREACHABLE_SECONDS = 5.0
# Adapters that a server tells of, the latest used first.
TOLD_ADAPTERS = 1024


@dataclass(frozen=True, slots=True)
class Report:
    """What a server says of itself. `load` are the requests of clients that it works on, `held` the names of the
    adapters that are loaded, the latest used first."""

    slots: int
    max_rank: int
    load: float
    held: Sequence[str] = ()


class Told(msgspec.Struct):
    """A report with what else the others need, as it is written down. `held` has marks, `rates` are by name."""

    bases: list[str]
    slots: int
    max_rank: int
    load: float
    held: list[int]
    total: float
    rates: dict[str, float]


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
        me: str,
        address: str,
        bases: Sequence[str],
        here: Here,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self.address = address
        self._bases = sorted(bases)
        self._here = here
        self._clock = clock
        self._placement = Placement(clock())
        self._peers: dict[str, Peer] = {}
        self._holders: dict[int, list[int]] = {}
        self._places: list[Peer | None] = []
        # What this server told last; None while it answers nobody.
        self._told: Told | None = None

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The other servers that live."""
        return tuple(self._peers.values())

    def told(self) -> dict[str, Any]:
        """What the heartbeat is to tell."""
        report, own = self._here.report(), self._placement.own
        if report is None:
            self._told = None
            return {"address": None, "report": None}
        self._told = Told(
            self._bases,
            report.slots,
            report.max_rank,
            report.load,
            [mark(name) for name in report.held[:TOLD_ADAPTERS]],
            own.total,
            {name: round(rate, 4) for name, rate in own.names.items()},
        )
        return {"address": self.address, "report": msgspec.json.encode(self._told).decode()}

    def hear(self, others: Sequence[Row]) -> None:
        """The rows of the other servers that live."""
        told = {row["id"]: (row["address"], _read(row)) for row in others if row["address"]}
        peers = {id: (address, one) for id, (address, one) in told.items() if one and one.bases == self._bases}
        for id in self._peers.keys() - peers.keys():
            gone = self._peers.pop(id)
            log.info("the server %s has left the fleet", id)
            for alarm in tuple(gone.alarms):
                alarm()
        for id, (address, one) in peers.items():
            self._peers.setdefault(id, Peer(id, address)).hear(address, one.load)
        everyone = {id: one for id, (_, one) in peers.items()} | ({self.me: self._told} if self._told else {})
        self._placement.resize(self._here.seats)
        self._placement.see([Replica(id, one.slots, one.max_rank) for id, one in everyone.items()])
        self._placement.hear({id: Rates(one.total, one.rates) for id, (_, one) in peers.items()})
        self._places = [self._peers.get(member.id) for member in self._placement.members]
        holders: defaultdict[int, list[int]] = defaultdict(list)
        for place, member in enumerate(self._placement.members):
            for adapter in everyone[member.id].held:
                holders[adapter].append(place)
        self._holders = dict(holders)

    def routing_stats(self) -> dict[str, Any]:
        """What a router in front of the servers is to know of this one; nothing, while it answers nobody. The same as
        long as nothing changed: each change is told to every router."""
        if (told := self._told) is None:
            return {}
        stats = Stats(self.me, told.bases, told.slots, told.max_rank, self._here.seats, sorted(told.held))
        return msgspec.structs.asdict(stats)

    def route(self, name: str, rank: int) -> Peer | None:
        """Who is to answer a request of a client for an adapter of this rank; None: this server."""
        placement = self._placement
        placement.count(name)
        if not self._peers:
            return None
        load = self._here.load
        loads = [load if peer is None else peer.load + peer.sent for peer in self._places]
        holders = self._holders.get(mark(name), ())
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


def _read(row: Row) -> Told | None:
    """What a server says of itself; None of one that says it in another way."""
    try:
        return msgspec.json.decode(row["report"] or b"", type=Told)
    except msgspec.DecodeError:
        return None
