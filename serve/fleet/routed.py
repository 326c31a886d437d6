"""Servers as a router in front of them sees them, which is none of them: whom it sends a request for a name to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from serve.fleet.homes import Replica, mark
from serve.fleet.placement import SEATS, Placement


class Stats(msgspec.Struct):
    """What a server tells a router. `id` is its name among the servers of its registry, which homes are drawn by."""

    id: str
    bases: list[str]
    slots: int
    max_rank: int
    seats: float
    held: list[int]


class RoutedServers:
    """`keys` are the router's own names of servers. For one event loop; the time is handed in."""

    def __init__(self, now: float = 0.0) -> None:
        self._placement = Placement(now)
        self._keys: Sequence[str] = ()
        self._holders: Mapping[int, Sequence[int]] = {}
        self._bases: frozenset[str] = frozenset()

    def see(self, told: Mapping[str, object]) -> None:
        """What each server told last, by its key. One that has told nothing yet is no home."""
        servers: dict[str, tuple[str, Stats]] = {}
        for key, stats in told.items():
            try:
                read = msgspec.convert(stats, Stats)
            except msgspec.ValidationError:
                continue
            servers[read.id] = key, read
        self._placement.see([Replica(id, one.slots, one.max_rank) for id, (_, one) in servers.items()])
        ordered = [servers[member.id] for member in self._placement.members]
        self._placement.resize(min((one.seats for _, one in ordered), default=SEATS))
        self._keys = [key for key, _ in ordered]
        self._bases = frozenset(base for _, one in ordered for base in one.bases)
        holders: defaultdict[int, list[int]] = defaultdict(list)
        for place, (_, one) in enumerate(ordered):
            for adapter in one.held:
                holders[adapter].append(place)
        self._holders = holders

    def count(self, name: str) -> None:
        """A request for the name came."""
        if name and name not in self._bases:
            self._placement.count(name)

    def ranks(self, name: str, loads: Mapping[str, float], now: float) -> list[list[str]]:
        """Keys by preference: homes that are not crowded, whoever holds the adapter, and at last all of `loads`, which
        has what each server works on. A base, and what has no name, has no home."""
        everyone = list(loads)
        if not name or name in self._bases or any(key not in loads for key in self._keys) or not self._keys:
            return [everyone]
        holders = self._holders.get(mark(name), ())
        *better, _ = self._placement.ranks(name, [loads[key] for key in self._keys], now, 0, holders)
        return [*([self._keys[place] for place in places] for places in better), everyone]
