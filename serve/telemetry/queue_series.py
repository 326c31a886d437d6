"""The server's own queue by adapter and tenant: who waits, for how long, and who is refused.

At most `limit` pairs of an adapter and a tenant have series of their own, the rest are counted together as `other`.
Once all places are taken, a pair that waits takes the place of the least busy one if that waits less than half as
much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.engine.engine import LOW_PRIORITY
from serve.engine.fair_queue import Backlog
from serve.engine.fleet import Fleet

Pair = tuple[str, str]  # adapter, tenant
LABELS = ("adapter", "tenant")
OTHER: Pair = ("other", "other")
# Whoever has neither waited nor been refused for so many seconds gives way to whoever is refused.
QUIET = 60.0


@dataclass(slots=True)
class _Place:
    """What is counted of a pair. `waiting` as of the last tidying; `busy` when it last waited or was refused."""

    refused: int = 0
    waiting: int = 0
    busy: float = 0.0

    @property
    def rank(self) -> tuple[int, float]:
        """The least busy has the smallest."""
        return (self.waiting, self.busy)


class QueueSeries(Collector):
    """`take` and `tidy` belong to the event loop, `collect` to any thread. Background work is left out."""

    def __init__(self, fleet: Fleet, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._limit = limit
        self._clock = clock
        self._places: dict[Pair, _Place] = {}
        self._refused_others = 0

    def take(self, adapter: str, tenant: str, *, refused: bool) -> None:
        """Count a request of the tenant for the adapter, `refused` because it would have waited too long."""
        pair = (adapter, tenant)
        place = self._places.get(pair)
        if place is None and (len(self._places) < self._limit or (refused and self._dismiss(QUIET))):
            place = self._places[pair] = _Place()
        if not refused:
            return
        if place is None:
            self._refused_others += 1
            return
        place.refused += 1
        place.busy = self._clock()

    def tidy(self, adapters: Collection[str]) -> None:
        """Give the places to those who wait; `adapters` are those there are."""
        backlogs = self._backlogs()
        for pair, place in list(self._places.items()):
            place.waiting = backlogs[pair].tickets if pair in backlogs else 0
            if place.waiting:
                place.busy = self._clock()
            elif pair[0] not in adapters:
                del self._places[pair]
        for pair in sorted(backlogs.keys() - self._places.keys(), key=lambda pair: -backlogs[pair].tickets):
            waiting = backlogs[pair].tickets
            if len(self._places) < self._limit or self._dismiss(0.0, waiting):
                self._places[pair] = _Place(0, waiting, self._clock())

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "loradock_queue_waiting",
            "Requests of clients that wait for a seat in the server's own queue when it is scraped.",
            labels=LABELS,
        )
        oldest = GaugeMetricFamily(
            "loradock_queue_oldest_seconds",
            "Seconds that the request which waits longest in the server's own queue has waited when it is scraped.",
            labels=LABELS,
        )
        refused = CounterMetricFamily(
            "loradock_queue_refused",
            "Requests that got 429 because they would have waited longer than max_wait, since the server started.",
            labels=LABELS,
        )
        now, backlogs = time.monotonic(), self._backlogs()
        for pair, place in list(self._places.items()):
            backlog = backlogs.pop(pair, Backlog(0, now))
            waiting.add_metric(pair, backlog.tickets)
            oldest.add_metric(pair, max(0.0, now - backlog.oldest))
            refused.add_metric(pair, place.refused)
        waiting.add_metric(OTHER, sum(backlog.tickets for backlog in backlogs.values()))
        oldest.add_metric(OTHER, max((now - backlog.oldest for backlog in backlogs.values()), default=0.0))
        refused.add_metric(OTHER, self._refused_others)
        yield from (waiting, oldest, refused)

    def _dismiss(self, quiet: float, waiting: int = 1) -> bool:
        """Whether the least busy pair has given up its place to one that waits so much."""
        pair = min(self._places, key=lambda pair: self._places[pair].rank, default=None)
        if pair is None:
            return False
        place = self._places[pair]
        if 2 * place.waiting >= waiting or self._clock() - place.busy < quiet:
            return False
        del self._places[pair]
        return True

    def _backlogs(self) -> dict[Pair, Backlog]:
        """What waits, of all engines; the versions of an adapter together."""
        backlogs: dict[Pair, Backlog] = {}
        for base in self._fleet:
            for (tenant, adapter_id), backlog in base.engine.queue.backlog(LOW_PRIORITY).items():
                if not tenant:  # the server's own
                    continue
                pair = (adapter_id.rpartition("@")[0] if adapter_id else base.name, tenant)
                known = backlogs.get(pair, Backlog(0, backlog.oldest))
                backlogs[pair] = Backlog(known.tickets + backlog.tickets, min(known.oldest, backlog.oldest))
        return backlogs
