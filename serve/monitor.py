"""Eats Exchanges, owns our Prometheus series, and reads live state when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.audit import Audit
from serve.engine import Phase
from serve.fleet import Fleet
from serve.registry import Registry
from serve.tap import Exchange

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LABELS = ("adapter", "version")
# vLLM grows a series for every combination of running adapters there and never removes one.
UNBOUNDED = "vllm:lora_requests_info"


# A third of the series, and nobody's dashboard reads them.
disable_created_metrics()


class Monitor:
    """The `loradock_*` series. Labels are registered names, nothing that clients send."""

    def __init__(self, fleet: Fleet, registry: Registry, audit: Audit, version: str) -> None:
        self._fleet = fleet
        self._collectors = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by the version that answered and the HTTP status.", "code")
        self.swaps = Counter(
            "loradock_adapter_swaps",
            "Changes of an adapter's live version.",
            ("adapter", "result"),
            registry=self._collectors,
        )
        self._shadows = Counter(
            "loradock_shadow_requests",
            "Requests that a shadow was to answer too: answered, failed, or dropped because others were under way.",
            (*LABELS, "result"),
            registry=self._collectors,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From the request's arrival to its first bytes.")
        self._total = self._histogram("request_duration_seconds", "From the request's arrival to its last byte.")
        self._collectors.register(LiveState(fleet, registry, audit, version))

    def take(self, exchange: Exchange) -> None:
        """Count one exchange."""
        labels = (exchange.adapter, exchange.version)
        self.requests.labels(*labels, str(exchange.status)).inc()
        if exchange.first is not None and exchange.status == 200:
            self._first.labels(*labels).observe(exchange.first)
            self._total.labels(*labels).observe(exchange.total)

    def shadowed(self, adapter: str, version: str, result: str) -> None:
        """Count one request that a shadow was to answer."""
        self._shadows.labels(adapter, version, result).inc()

    def render(self) -> bytes:
        """Our series and the engine's, in the Prometheus text format."""
        return generate_latest(self._collectors) + generate_latest(REGISTRY) + generate_latest(_Theirs(self._fleet))

    def _counter(self, name: str, help: str, *more: str) -> Counter:
        return Counter(f"loradock_{name}", help, (*LABELS, *more), registry=self._collectors)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"loradock_{name}", help, LABELS, registry=self._collectors, buckets=SECONDS)


class LiveState(Collector):
    """What is true at the moment of the scrape."""

    def __init__(self, fleet: Fleet, registry: Registry, audit: Audit, version: str) -> None:
        self._fleet = fleet
        self._audit = audit
        self._registry = registry
        self._version = version

    def collect(self) -> Iterator[Metric]:
        vllm = self._fleet.first.backend.version
        yield InfoMetricFamily("loradock_build", "Versions.", {"version": self._version, "vllm": vllm})
        phase = GaugeMetricFamily(
            "loradock_engine_phase", "1 for the phase the engine is in.", labels=("model", "phase")
        )
        restarts = CounterMetricFamily(
            "loradock_engine_restarts", "Engines started anew after a death.", labels=("model",)
        )
        waiting = GaugeMetricFamily("loradock_engine_waiting", "Requests in the engine's own queue.", labels=("model",))
        memory = GaugeMetricFamily("loradock_engine_memory_bytes", "Of the engine's processes.", labels=("model",))
        leases = 0
        for base in self._fleet:
            for one in Phase:
                phase.add_metric((base.name, one.value), float(base.phase is one))
            restarts.add_metric((base.name,), base.restarts)
            waiting.add_metric((base.name,), base.backend.waiting)
            memory.add_metric((base.name,), base.backend.memory)
            leases += base.leases
        yield from (phase, restarts, waiting, memory)
        yield GaugeMetricFamily("loradock_requests_in_progress", "Answers under way.", value=leases)
        yield GaugeMetricFamily("loradock_adapters", "Registered adapters.", value=len(self._registry.names()))
        yield CounterMetricFamily(
            "loradock_audit_failures", "Lines that the audit log lacks.", value=self._audit.failures
        )
        state = GaugeMetricFamily("loradock_adapter_state", "1 while the version is there.", labels=(*LABELS, "state"))
        resident = {residence.id for base in self._fleet for residence in base.residents if residence.loaded}
        for adapter in self._registry.adapters():
            state.add_metric((adapter.name, f"v{adapter.version}", "host"), float(adapter.id in resident))
        yield state


class _Theirs(CollectorRegistry):
    """vLLM's series of every engine that serves, each series once."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for base in self._fleet:
            if base.phase is not Phase.READY:
                continue
            for family in base.backend.metrics():
                if family.name == UNBOUNDED:
                    continue
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()
