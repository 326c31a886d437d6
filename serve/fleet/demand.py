"""How much of the load each name has, smoothed, and how many homes that makes.

A number of homes grows at most every few seconds and shrinks after a minute, so that a wave moves nothing. A home that
is crowded cuts the wait short: what came since the last step counts then, and not only what is smoothed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from serve.fleet.homes import NAME_PORTION, homes_for

STEP_SECONDS = 3.0
SMOOTH_SECONDS = 30.0
GROW_SECONDS = 9.0
SHRINK_SECONDS = 60.0
# A smaller number of homes must be enough for so much more than there is.
SHRINK_MARGIN = 1.3
# Names with less than this part of a replica's load are forgotten: they have one home anyway.
KEPT_PORTION = 0.02
# Requests since the last step that say something about a share.
FEW = 20


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests a second that came to one server: in all, and for the names that have a part of a replica's load."""

    total: float
    names: Mapping[str, float]


@dataclass(slots=True)
class _Homes:
    count: int
    changed: float


class Demand:
    """Counts requests by name. Other servers' rates are told from time to time."""

    def __init__(self, now: float) -> None:
        self._began = self._started = now
        # For which there are rates.
        self._seconds = 0.0
        self._counts: Counter[str] = Counter()
        self._counted = 0
        self._own = Rates(0.0, {})
        self._told: Mapping[str, Rates] = {}
        # Of names that may need more homes than one.
        self._shares: dict[str, float] = {}
        self._homes: dict[str, _Homes] = {}

    @property
    def own(self) -> Rates:
        """What to tell the other servers."""
        return self._own

    def hear(self, others: Mapping[str, Rates]) -> None:
        """What the other servers say, by their ids, in the place of what they said before."""
        self._told = others

    def count(self, name: str) -> None:
        """A request for it came to this server."""
        self._counts[name] += 1
        self._counted += 1

    def homes(self, name: str) -> int:
        """How many homes it has."""
        homes = self._homes.get(name)
        return homes.count if homes else 1

    def step(self, now: float, replicas: int, load: float, seats: float) -> None:
        """Bring shares and numbers of homes up to date, if it is time: `load` are the requests under way everywhere."""
        if now - self._began < STEP_SECONDS:
            return
        self._smooth(now, replicas)
        self._shares = self._shared(replicas)
        for name in self._shares.keys() | self._homes.keys():
            share = self._shares.get(name, 0.0)
            wanted = homes_for(share, replicas, load, seats)
            homes = self._homes.get(name) or _Homes(1, self._started)
            if wanted > homes.count and now - homes.changed >= GROW_SECONDS:
                self._homes[name] = _Homes(wanted, now)
            elif wanted < homes.count and now - homes.changed >= SHRINK_SECONDS:
                self._shrink(name, homes_for(share * SHRINK_MARGIN, replicas, load, seats), now)

    def crowded(self, name: str, now: float, replicas: int, load: float, seats: float) -> bool:
        """Its homes have too much to do: it gets more of them now, if that is for its own sake. Whether it did."""
        share = self._shares.get(name, 0.0)
        if self._counted >= FEW:
            share = max(share, self._counts[name] / self._counted)
        wanted = homes_for(share, replicas, load, seats)
        if wanted <= self.homes(name):
            return False
        self._homes[name] = _Homes(wanted, now)
        return True

    def _shrink(self, name: str, enough: int, now: float) -> None:
        homes = self._homes[name]
        if enough >= homes.count:
            return
        if enough <= 1:
            del self._homes[name]
        else:
            self._homes[name] = _Homes(enough, now)

    def _smooth(self, now: float, replicas: int) -> None:
        """The rates of this server, over half a minute or so."""
        seconds = now - self._began
        self._seconds += seconds
        # The plain mean of what there is, as long as that is less than what is smoothed over.
        weight = max(-math.expm1(-seconds / SMOOTH_SECONDS), seconds / self._seconds)
        counts, before = self._counts, self._own.names
        total = self._own.total + weight * (self._counted / seconds - self._own.total)
        least = KEPT_PORTION * total / max(replicas, 1)
        rates: dict[str, float] = {}
        for name in counts.keys() | before.keys():
            rate = before.get(name, 0.0)
            rate += weight * (counts[name] / seconds - rate)
            if rate >= least:
                rates[name] = rate
        self._own = Rates(total, rates)
        self._began = now
        self._counts = Counter()
        self._counted = 0

    def _shared(self, replicas: int) -> dict[str, float]:
        """The share of each name that may need more homes than one."""
        everywhere = [self._own, *self._told.values()]
        total = sum(rates.total for rates in everywhere)
        if total <= 0:
            return {}
        summed: Counter[str] = Counter()
        for rates in everywhere:
            summed.update(rates.names)
        least = NAME_PORTION * total / max(replicas, 1)
        return {name: rate / total for name, rate in summed.items() if rate > least}
