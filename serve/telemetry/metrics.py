"""Counts Exchanges, owns our Prometheus series, and reads live state when it is scraped.

Labels are registered names, nothing that clients send, and at most `limit` versions have series of their own: the rest
are counted under `other`. Versions that may be asked have their series before they are, at 0, as long as there is room:
Prometheus does not see the growth of a counter that is born with its first event. A version that is out of the engine
and unasked for some minutes gives its place back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from threading import Lock
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest
from prometheus_client.registry import Collector

from serve import __version__
from serve.adapters.registry.registry import Registry
from serve.asgi.exchange import Exchange, Failure
from serve.auth.audit import Audit
from serve.engine.fleet import Fleet
from serve.events import Event, Promoted, RollbackAttempted, RolledBack, Unloaded
from serve.telemetry.families import Family
from serve.telemetry.gateway_series import READ, AdapterSeries, EngineSeries, GatewaySeries
from serve.telemetry.live_state import LiveState
from serve.telemetry.places import TIDY, Places
from serve.telemetry.queue_series import QueueSeries
from serve.telemetry.series import OTHER, AdapterLoads, OwnFamilies, Series

# As the engine says it; whatever else it might say is `other`.
FINISH_REASONS = frozenset({"", "stop", "length", "abort", "error", "repetition"})
# What becomes of an adapter's live version.
SWAPS = ("promoted", "rolled_back")
# A render is good for so many seconds.
FRESH = 1.0
FRESH_FOR_GATEWAYS = 0.05
# What was removed is scraped once or twice more, and may be needed no longer.
KEEP_REMOVED = 60.0
# Versions whose series begin with one scrape: a hundred at once would hold the event loop up.
BEGUN_AT_ONCE = 20

# A third of the series, and nobody's dashboard reads them.
disable_created_metrics()


class Metrics:
    """The `loradock_*` series. `take` belongs to the event loop, `render` to a thread of its own."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        audit: Audit,
        loads: AdapterLoads,
        *,
        more: Sequence[Family] = (),
        limit: int = 100,
        keep: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._registry = registry
        self._limit = limit
        self._keep = keep
        self._clock = clock
        self._collectors = CollectorRegistry()
        self._families = OwnFamilies(loads, more)
        self._series: dict[tuple[str, str], Series] = {}
        self._versions = Places[tuple[str, str]](limit, self._forget_version)
        self._adapters = Places[str](limit, self._forget_adapter)
        self._rendering = Lock()
        self._rendered: dict[Any, tuple[float, bytes]] = {}
        self._tidied = -TIDY

        self._queue = QueueSeries(fleet, limit, clock=clock)
        for collector in (
            LiveState(fleet, registry, audit, __version__, limit, self._series),
            self._queue,
        ):
            self._collectors.register(collector)
        self._gateway = CollectorRegistry()
        self._gateway.register(AdapterSeries(fleet, registry, limit))

    def take(self, exchange: Exchange) -> None:
        """Count one exchange."""
        series = self._of(exchange.adapter, exchange.version)
        reason = exchange.finish_reason if exchange.finish_reason in FINISH_REASONS else "other"
        series.requests(str(exchange.status), reason).inc()
        if exchange.failure:
            series.failures(exchange.failure).inc()
        if exchange.version:
            self._queue.take(exchange.adapter, exchange.tenant, refused=exchange.failure is Failure.OVERLOADED)
        if exchange.generations:
            series.prompt.inc(exchange.prompt_tokens)
            series.generated.inc(exchange.generated_tokens)
        for made in exchange.generations:
            drafted, accepted = made.drafts
            series.accepted.inc(accepted)
            series.rejected.inc(drafted - accepted)
        for histogram, seconds in (
            (series.queue, exchange.seat_wait),
            (series.engine_queue, exchange.queue),
            (series.gap, exchange.gap),
            (series.worst, exchange.worst_gap),
        ):
            if seconds is not None:
                histogram.observe(seconds, exchange.echoed_id, exchange.trace_id)
        if exchange.first is not None and exchange.status == 200:
            series.first.observe(exchange.first, exchange.echoed_id, exchange.trace_id)
            series.total.observe(exchange.total, exchange.echoed_id, exchange.trace_id)

    def tap_took(self, seconds: float) -> None:
        """Count what looking at one exchange took of the event loop."""
        self._families.tap.labels().observe(seconds)

    def rated(self, adapter: str, version: str, rating: str) -> None:
        """Count one answer that somebody found good or bad."""
        self._of(adapter, version).child(self._families.feedback, rating).inc()

    def count(self, event: Event) -> None:
        """Count what happened to a version. For the event loop."""
        match event:
            case Promoted():
                self.swapped(event.adapter, "promoted")
            case RolledBack():
                self.swapped(event.adapter, "rolled_back")
            case Unloaded():
                self.swapped(event.adapter, "unloaded")
            case RollbackAttempted(done=True):
                self.rolled_back(event.adapter, event.version, event.reason)

    def swapped(self, adapter: str, result: str) -> None:
        """Count one change of an adapter's live version."""
        self._families.swaps.labels(self._of_adapter(adapter), result).inc()

    def shadowed(self, adapter: str, version: str, result: str) -> None:
        """Count one request that a shadow was to answer."""
        self._of(adapter, version).child(self._families.shadows, result).inc()

    def rolled_back(self, adapter: str, version: int, reason: str) -> None:
        """Count one version that the server itself took the traffic from."""
        name, rollbacks = self._of_adapter(adapter), self._families.rollbacks
        self._families.adapter_rollbacks.labels(name).inc()
        rollbacks.labels(*((name, f"v{version}") if name == adapter else OTHER), reason).inc()
        for oldest in rollbacks.known()[: -self._limit]:
            rollbacks.remove(*oldest)

    def watch(self, collector: Collector) -> None:
        """Render this one's series too."""
        self._collectors.register(collector)

    def label(self, adapter: str, version: str) -> tuple[str, str]:
        """The labels of a version: its own, or `other` when all places are taken."""
        labels = (adapter, version)
        return labels if labels in self._series or self._versions.has_room else OTHER

    def labelled(self, adapter: str) -> bool:
        """Whether some version of the adapter has labels of its own."""
        return any(labels[0] == adapter for labels in list(self._series))

    def tidy(self) -> None:
        """Begin the series of what may be asked; drop those of what nobody asks and the engine does not hold."""
        current = [(adapter.name, f"v{adapter.version}") for adapter in self._registry.current()]
        self._drop_unasked(frozenset(current))
        for labels in [labels for labels in current if labels not in self._versions][:BEGUN_AT_ONCE]:
            if self._versions.expect(labels):
                self._begin(labels)
        names = dict.fromkeys(self._registry.names())
        for gone in self._adapters.keys() - names.keys():
            self._adapters.drop(gone)
        for name in names:
            if self._adapters.expect(name):
                self._begin_adapter(name)
        bases = [base.name for base in self._fleet]
        for labels in (OTHER, *((base, "base") for base in bases)):
            self._begin(labels)
        self._queue.tidy(names.keys() | set(bases))

    def _drop_unasked(self, current: Collection[tuple[str, str]]) -> None:
        """Versions that were removed go sooner; those that still serve keep their place until somebody needs it."""
        now = self._tidied = self._clock()
        resident = {residence.id for base in self._fleet for residence in base.residents}
        known = {(its.name, f"v{its.version}"): its.id in resident for its in self._registry.adapters()}
        for labels in list(self._versions.keys()):
            series = self._series[labels]
            if known.get(labels):
                series.see(now)
            elif now - series.seen > (self._keep if labels in known else KEEP_REMOVED):
                if labels in current:
                    self._versions.release(labels)
                else:
                    self._versions.drop(labels)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Our series and the engine's for whoever accepts this, and the content type."""
        return self._fresh(
            "all", accept, self._ours, lambda: (self._collectors, self._gateway, REGISTRY, GatewaySeries(self._fleet))
        )

    def render_engine(self, accept: str = "") -> tuple[bytes, str]:
        """The engine's own series, all of them."""
        return self._fresh("engine", accept, lambda openmetrics: "", lambda: (EngineSeries(self._fleet),))

    def render_gateway(self, accept: str = "") -> tuple[bytes, str]:
        """What an endpoint picker reads and no more: it asks several times a second."""
        return self._fresh(
            "gateway",
            accept,
            lambda openmetrics: "",
            lambda: (self._gateway, GatewaySeries(self._fleet, READ)),
            seconds=FRESH_FOR_GATEWAYS,
        )

    def _fresh(
        self,
        what: str,
        accept: str,
        ours: Callable[[bool], str],
        collectors: Callable[[], Iterable[Any]],
        seconds: float | None = None,
    ) -> tuple[bytes, str]:
        """What was rendered less than a second ago (or so many `seconds`), or now: many scrapers cost what one does."""
        encode, content_type = choose_encoder(accept)
        if "openmetrics" in content_type:
            # Otherwise the colon of `vllm:` becomes an underscore, and nobody's dashboard finds it.
            encode = partial(openmetrics_latest, escaping=ALLOWUTF8)
        asked = time.monotonic()
        with self._rendering:
            when, text = self._rendered.get((what, content_type), (0.0, b""))
            if not text or asked - when > (FRESH if seconds is None else seconds):
                when = time.monotonic()  # before it: what is counted meanwhile may be in it or not
                openmetrics = "openmetrics" in content_type
                text = _joined([ours(openmetrics).encode(), *(encode(collector) for collector in collectors())])
                self._rendered[what, content_type] = (when, text)
            return text, content_type

    def _ours(self, openmetrics: bool) -> str:
        return self._families.render(openmetrics)

    def _of(self, adapter: str, version: str) -> Series:
        """The series of a version; those of `other` when there are enough already."""
        labels = (adapter, version)
        if labels != OTHER and adapter not in self._fleet:
            if labels not in self._versions and not self._versions.has_room and self._clock() - self._tidied >= TIDY:
                self.tidy()
            labels = labels if self._versions.take(labels) else OTHER
        series = self._begin(labels)
        series.see(self._clock())
        return series

    def _begin(self, labels: tuple[str, str]) -> Series:
        """The series with these labels, at 0 if they are new."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = Series(self._families, labels)
        return series

    def _forget_version(self, labels: tuple[str, str]) -> None:
        self._series.pop(labels).remove()

    def _of_adapter(self, adapter: str) -> str:
        """The label of what is counted by adapter alone; `other` when all places are taken."""
        name = adapter if self._adapters.take(adapter) else OTHER[0]
        self._begin_adapter(name)
        return name

    def _begin_adapter(self, name: str) -> None:
        self._families.adapter_rollbacks.labels(name)
        for result in SWAPS:
            self._families.swaps.labels(name, result)

    def _forget_adapter(self, name: str) -> None:
        families = self._families
        for family in (families.adapter_rollbacks, families.swaps, families.rollbacks):
            for labels in family.known():
                if labels[0] == name:
                    family.remove(*labels)


def _joined(parts: Sequence[bytes]) -> bytes:
    """Expositions after one another: OpenMetrics ends with a line that may stand there once."""
    end = b"# EOF\n"
    if not parts or not parts[-1].endswith(end):
        return b"".join(parts)
    return b"".join(part.removesuffix(end) for part in parts) + end
