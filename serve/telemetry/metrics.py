"""Counts Exchanges, owns our Prometheus series, and reads live state when it is scraped.

Labels are registered names, nothing that clients send, and at most `limit` versions have series of their own: the rest
are counted under `other`. A version that is out of the engine and unasked for some minutes gives its place back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest
from prometheus_client.registry import Collector

from serve.adapters.adapter import Adapter
from serve.adapters.registry import Registry
from serve.asgi.exchange import Exchange
from serve.auth.audit import Audit
from serve.engine.engine import Phase
from serve.engine.fleet import Fleet
from serve.telemetry.families import Family
from serve.telemetry.series import LABELS, AdapterLoads, OwnFamilies, Series
from serve.telemetry.slo import Slo

OTHER = ("other", "")
# vLLM grows a series for every combination of running adapters there and never removes one.
UNBOUNDED = "vllm:lora_requests_info"
# As the engine says it; whatever else it might say is `other`.
FINISH_REASONS = frozenset({"", "stop", "length", "abort", "error", "repetition"})
# A render is good for so many seconds.
FRESH = 1.0
# What was removed is scraped once or twice more, and may be needed no longer.
KEEP_REMOVED = 60.0
# Seconds between two looks for a place while none is free.
TIDY = 5.0

# A third of the series, and nobody's dashboard reads them.
disable_created_metrics()


class Metrics:
    """The `loradock_*` series. `take` belongs to the event loop, `render` to a thread of its own."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        audit: Audit,
        version: str,
        loads: AdapterLoads,
        slos: Sequence[Slo] = (),
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
        self._rendering = Lock()
        self._rendered: dict[Any, tuple[float, bytes]] = {}
        self._tidied = -TIDY

        self._state = LiveState(fleet, registry, audit, version, limit, self._series)
        self._collectors.register(self._state)
        self._collectors.register(Objectives(slos))

    def take(self, exchange: Exchange) -> None:
        """Count one exchange."""
        series = self._of(exchange.adapter, exchange.version)
        reason = exchange.finish_reason if exchange.finish_reason in FINISH_REASONS else "other"
        series.requests(str(exchange.status), reason).inc()
        if exchange.generations:
            series.prompt.inc(exchange.prompt_tokens)
            series.generated.inc(exchange.generated_tokens)
            for histogram, seconds in (
                (series.queue, exchange.queue),
                (series.gap, exchange.gap),
                (series.worst, exchange.worst_gap),
            ):
                if seconds is not None:
                    histogram.observe(seconds, exchange.request_id, exchange.trace_id)
        if exchange.first is not None and exchange.status == 200:
            series.first.observe(exchange.first, exchange.request_id, exchange.trace_id)
            series.total.observe(exchange.total, exchange.request_id, exchange.trace_id)

    def tap_took(self, seconds: float) -> None:
        """Count what looking at one exchange took of the event loop."""
        self._families.tap.labels().observe(seconds)

    def rated(self, adapter: str, version: str, rating: str) -> None:
        """Count one answer that somebody found good or bad."""
        self._of(adapter, version).child(self._families.feedback, rating).inc()

    def swapped(self, adapter: str, result: str) -> None:
        """Count one change of an adapter's live version."""
        self._families.swaps.labels(self._name(adapter), result).inc()

    def shadowed(self, adapter: str, version: str, result: str) -> None:
        """Count one request that a shadow was to answer."""
        self._of(adapter, version).child(self._families.shadows, result).inc()

    def rolled_back(self, adapter: str, version: int, reason: str) -> None:
        """Count one version that the server itself took the traffic from."""
        self._of(adapter, f"v{version}").child(self._families.rollbacks, reason).inc()

    def watch(self, collector: Collector) -> None:
        """Render this one's series too."""
        self._collectors.register(collector)

    def label(self, adapter: str, version: str) -> tuple[str, str]:
        """The labels of a version: its own, or `other` when all places are taken."""
        room = len(self._series) < self._limit
        return (adapter, version) if room or (adapter, version) in self._series else OTHER

    def tidy(self) -> None:
        """Drop the series of versions that nobody asks and the engine does not hold, removed ones sooner."""
        now = self._tidied = self._clock()
        resident = {residence.id for base in self._fleet for residence in base.residents}
        known = {(one.name, f"v{one.version}"): one.id in resident for one in self._registry.adapters()}
        held = {labels for labels, is_resident in known.items() if is_resident}
        names = {adapter for adapter, _ in held} | set(self._registry.names())
        for labels, series in list(self._series.items()):
            if labels in held:
                series.seen = now
            elif labels == OTHER or labels[0] in self._fleet:
                continue
            elif now - series.seen > (self._keep if labels in known else KEEP_REMOVED):
                del self._series[labels]
                series.remove()
        for gone in [swapped for swapped in self._families.swaps.known() if swapped[0] not in names]:
            self._families.swaps.remove(*gone)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Our series and the engine's for whoever accepts this, and the content type."""
        return self._fresh(
            "all", accept, self._ours, lambda: (self._collectors, REGISTRY, Theirs(self._fleet, UNBOUNDED))
        )

    def render_engine(self, accept: str = "") -> tuple[bytes, str]:
        """The engine's own series, all of them."""
        return self._fresh("engine", accept, lambda openmetrics: "", lambda: (Theirs(self._fleet),))

    def _fresh(
        self,
        what: str,
        accept: str,
        ours: Callable[[bool], str],
        collectors: Callable[[], Iterable[Any]],
    ) -> tuple[bytes, str]:
        """What was rendered less than a second ago, or now: many scrapers cost what one does."""
        encode, content_type = choose_encoder(accept)
        if "openmetrics" in content_type:
            # Otherwise the colon of `vllm:` becomes an underscore, and nobody's dashboard finds it.
            encode = partial(openmetrics_latest, escaping=ALLOWUTF8)
        asked = time.monotonic()
        with self._rendering:
            when, text = self._rendered.get((what, content_type), (0.0, b""))
            if not text or asked - when > FRESH:
                when = time.monotonic()  # before it: what is counted meanwhile may be in it or not
                openmetrics = "openmetrics" in content_type
                text = _joined([ours(openmetrics).encode(), *(encode(one) for one in collectors())])
                self._rendered[what, content_type] = (when, text)
            return text, content_type

    def _ours(self, openmetrics: bool) -> str:
        return self._families.render(openmetrics)

    def _of(self, adapter: str, version: str) -> Series:
        """The series of a version; those of `other` when there are enough already."""
        series = self._series.get((adapter, version))
        if series is None:
            if self._full() and self._clock() - self._tidied >= TIDY:
                self.tidy()
            labels = OTHER if self._full() and adapter not in self._fleet else (adapter, version)
            series = self._series.get(labels) or self._series.setdefault(labels, Series(self._families, labels))
        series.seen = self._clock()
        return series

    def _full(self) -> bool:
        return len(self._series) - (OTHER in self._series) >= self._limit

    def _name(self, adapter: str) -> str:
        names = {labels[0] for labels in self._families.swaps.known()}
        return adapter if adapter in names or len(names) < self._limit else OTHER[0]


class Theirs(CollectorRegistry):
    """vLLM's series of every engine that serves, each series once, and one family left out."""

    def __init__(self, fleet: Fleet, without: str = "") -> None:
        super().__init__()
        self._fleet = fleet
        self._without = without

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for base in self._fleet:
            if base.phase is not Phase.READY:
                continue
            for family in base.backend.metrics():
                if family.name == self._without:
                    continue
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


class LiveState(Collector):
    """What is true at the moment of the scrape."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        audit: Audit,
        version: str,
        limit: int,
        labelled: dict[tuple[str, str], Series],
    ) -> None:
        self._fleet = fleet
        self._audit = audit
        self._registry = registry
        self._version = version
        self._limit = limit
        self._labelled = labelled

    def collect(self) -> Iterator[Metric]:
        vllm = self._fleet.first.backend.version
        yield InfoMetricFamily("loradock_build", "Versions.", {"version": self._version, "vllm": vllm})
        phase = GaugeMetricFamily(
            "loradock_engine_phase", "1 for the phase the engine is in.", labels=("model", "phase")
        )
        restarts = CounterMetricFamily(
            "loradock_engine_restarts", "Engines started anew after a death.", labels=("model",)
        )
        line = GaugeMetricFamily("loradock_line_waiting", "Requests that wait for their turn.", labels=("model",))
        waiting = GaugeMetricFamily("loradock_engine_waiting", "Requests in the engine's own queue.", labels=("model",))
        memory = GaugeMetricFamily("loradock_engine_memory_bytes", "Of the engine's processes.", labels=("model",))
        for base in self._fleet:
            for one in Phase:
                phase.add_metric((base.name, one.value), float(base.phase is one))
            restarts.add_metric((base.name,), base.restarts)
            waiting.add_metric((base.name,), base.backend.waiting)
            line.add_metric((base.name,), base.engine.queue.waiting)
            memory.add_metric((base.name,), base.backend.memory)
        yield from (phase, restarts, waiting, line, memory)
        yield GaugeMetricFamily("loradock_adapters", "Registered adapters.", value=len(self._registry.names()))
        yield CounterMetricFamily(
            "loradock_audit_failures", "Lines that the audit log lacks.", value=self._audit.failures
        )
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        """State and leases of each version; beyond the limit, sums of them under `other`."""
        running = GaugeMetricFamily("loradock_requests_in_progress", "Answers under way.", labels=LABELS)
        state = GaugeMetricFamily(
            "loradock_adapter_state",
            "1 for where the version is: in a slot of the batch, in the engine's memory, on disk, or not loadable.",
            labels=(*LABELS, "state"),
        )
        info = GaugeMetricFamily("loradock_adapter_info", "1.", labels=(*LABELS, "digest", "rank", "base"))
        leases: dict[str, int] = {}
        states: dict[str, str] = {}
        for base in self._fleet:
            mine = {residence.id: residence.leases for residence in base.residents}
            running.add_metric((base.name, "base"), max(base.leases - sum(mine.values()), 0))
            leases |= mine
            states |= base.engine.states
        busy, beyond = 0, dict.fromkeys(("slot", "host", "disk", "failed"), 0)
        shown = self._shown(states)
        for adapter in self._registry.adapters():
            where = states.get(adapter.id, "disk")
            if adapter.id not in shown:
                busy += leases.get(adapter.id, 0)
                beyond[where] += 1
                continue
            labels = (adapter.name, f"v{adapter.version}")
            running.add_metric(labels, leases.get(adapter.id, 0))
            info.add_metric((*labels, adapter.digest[:12], str(adapter.rank), adapter.base or ""), 1)
            for one in beyond:
                state.add_metric((*labels, one), float(one == where))
        if any(beyond.values()):
            running.add_metric(OTHER, busy)
            for one, count in beyond.items():
                state.add_metric((*OTHER, one), count)
        yield from (running, state, info)

    def _shown(self, states: dict[str, str]) -> set[str]:
        """Ids of the versions that are named: those that are counted by name, then the rest, what is loaded first."""
        labelled = set(self._labelled)

        def first(adapter: Adapter) -> tuple[bool, bool]:
            return (adapter.name, f"v{adapter.version}") not in labelled, adapter.id not in states

        return {adapter.id for adapter in sorted(self._registry.adapters(), key=first)[: self._limit]}


class Objectives(Collector):
    """The service level objectives that this server was given; rules rendered from others say so by comparing."""

    def __init__(self, slos: Sequence[Slo]) -> None:
        self._slos = slos

    def collect(self) -> Iterator[Metric]:
        threshold = GaugeMetricFamily(
            "loradock_slo_threshold_seconds",
            "What is slower is too slow; adapter * is every other.",
            labels=("adapter", "slo"),
        )
        target = GaugeMetricFamily(
            "loradock_slo_target", "The part that must be good, 0 to 1; 0 is no objective.", labels=("adapter", "slo")
        )
        for slo in self._slos:
            target.add_metric((slo.adapter, slo.objective), slo.target)
            if slo.threshold is not None:
                threshold.add_metric((slo.adapter, slo.objective), slo.threshold)
        yield threshold
        yield target


def _joined(parts: Sequence[bytes]) -> bytes:
    """Expositions after one another: OpenMetrics ends with a line that may stand there once."""
    end = b"# EOF\n"
    if not parts or not parts[-1].endswith(end):
        return b"".join(parts)
    return b"".join(part.removesuffix(end) for part in parts) + end
