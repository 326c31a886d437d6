"""Whom to send a request to, now: the homes of its name among the replicas that live, by what each has to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from serve.fleet.demand import Demand, Rates
from serve.fleet.homes import Replica, Replicas, bounds, order, ranked

# Names whose first homes are remembered, and how many of each.
NAMES, FIRST = 65_536, 4
# Requests that a replica works on at a time, until it says how many.
SEATS = 16.0


class Placement:
    """The replicas that live, and the numbers of homes. For one event loop; the time is handed in."""

    def __init__(self, now: float = 0.0, seats: float = SEATS) -> None:
        self.seats = seats
        self._demand = Demand(now)
        self._replicas = Replicas.of(())
        self._everyone: Sequence[int] = range(0)
        self._first: dict[tuple[str, int], list[int]] = {}

    @property
    def members(self) -> tuple[Replica, ...]:
        """In the order in which places number them."""
        return self._replicas.members

    @property
    def own(self) -> Rates:
        """The rates of the requests that came here, to tell other servers."""
        return self._demand.own

    def resize(self, seats: float) -> None:
        """So many requests a replica works on at a time."""
        self.seats = seats

    def see(self, members: Iterable[Replica]) -> bool:
        """These live; whether that is another fleet than before."""
        replicas = Replicas.of(members)
        if replicas.members == self._replicas.members:
            return False
        self._replicas = replicas
        self._everyone = range(len(replicas))
        self._first = {}
        return True

    def hear(self, others: Mapping[str, Rates]) -> None:
        """The rates of the requests that came to other servers, by the servers' ids."""
        self._demand.hear(others)

    def count(self, name: str) -> None:
        """A request for it came here from a client."""
        self._demand.count(name)

    def homes(self, name: str, rank: int = 0) -> Sequence[int]:
        """The places of its homes among `members`."""
        count = self._demand.homes(name)
        if count > FIRST:
            return order(self._replicas, name, rank)[:count]
        first = self._first.get((name, rank))
        if first is None:
            if len(self._first) >= NAMES:
                self._first = {}
            first = self._first[name, rank] = order(self._replicas, name, rank)[:FIRST]
        return first[:count]

    def ranks(
        self, name: str, loads: Sequence[float], now: float, rank: int = 0, holders: Collection[int] = ()
    ) -> list[Sequence[int]]:
        """Places by preference: the first of these has those that are best.

        `loads` are the requests that each of `members` works on, and `holders` the places of those that hold the
        adapter. A home that is crowded is left out, and its name gets more homes if it is what crowds it.
        """
        total = sum(loads)
        self._demand.step(now, len(self._replicas), total, self.seats)
        most = bounds(total, len(self._replicas), self.seats)
        homes = self.homes(name, rank)
        is_crowded = all(loads[home] >= most.crowded for home in homes)
        if is_crowded and self._demand.crowded(name, now, len(self._replicas), total, self.seats):
            homes = self.homes(name, rank)
        return ranked(homes, holders, loads, most, self._everyone)
