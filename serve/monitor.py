"""Eats Exchanges, owns our Prometheus series, and reads live state when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.audit import Audit
from serve.engine import Engine, Phase
from serve.registry import Registry
from serve.slo import FIRST_TOKEN_SECONDS, Slo
from serve.tap import Exchange

LABELS = ("adapter", "version")
# vLLM grows a series for every combination of running adapters there and never removes one.
UNBOUNDED = b"vllm:lora_requests_info"


# A third of the series, and nobody's dashboard reads them.
disable_created_metrics()


class Monitor:
    """The `loradock_*` series. Labels are registered names, nothing that clients send."""

    def __init__(
        self, engine: Engine, registry: Registry, audit: Audit, version: str, slos: Sequence[Slo] = ()
    ) -> None:
        self._engine = engine
        self._collectors = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by the version that answered and the HTTP status.", "code")
        self.swaps = Counter(
            "loradock_adapter_swaps",
            "Changes of an adapter's live version.",
            ("adapter", "result"),
            registry=self._collectors,
        )
        self._rollbacks = self._counter("rollbacks", "Versions that the server itself took the traffic from.", "reason")
        self._shadows = Counter(
            "loradock_shadow_requests",
            "Requests that a shadow was to answer too: answered, failed, or dropped because others were under way.",
            (*LABELS, "result"),
            registry=self._collectors,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From the request's arrival to its first bytes.")
        self._total = self._histogram("request_duration_seconds", "From the request's arrival to its last byte.")
        self._collectors.register(LiveState(engine, registry, audit, version))
        self._collectors.register(Objectives(slos))

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

    def rolled_back(self, adapter: str, version: int, reason: str) -> None:
        """Count one version that the server itself took the traffic from."""
        self._rollbacks.labels(adapter, f"v{version}", reason).inc()

    def render(self) -> bytes:
        """Our series and the engine's, in the Prometheus text format."""
        ours = generate_latest(self._collectors)
        if self._engine.phase is not Phase.READY:
            return ours
        theirs = self._engine.backend.metrics().splitlines(keepends=True)
        return ours + b"".join(line for line in theirs if UNBOUNDED not in line)

    def _counter(self, name: str, help: str, *more: str) -> Counter:
        return Counter(f"loradock_{name}", help, (*LABELS, *more), registry=self._collectors)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"loradock_{name}", help, LABELS, registry=self._collectors, buckets=FIRST_TOKEN_SECONDS)


class LiveState(Collector):
    """What is true at the moment of the scrape."""

    def __init__(self, engine: Engine, registry: Registry, audit: Audit, version: str) -> None:
        self._engine = engine
        self._audit = audit
        self._registry = registry
        self._version = version

    def collect(self) -> Iterator[Metric]:
        backend = self._engine.backend
        yield InfoMetricFamily("loradock_build", "Versions.", {"version": self._version, "vllm": backend.version})
        phase = GaugeMetricFamily(
            "loradock_engine_phase", "1 for the phase the engine is in.", labels=("model", "phase")
        )
        for one in Phase:
            phase.add_metric((self._engine.name, one.value), float(self._engine.phase is one))
        yield phase
        yield GaugeMetricFamily("loradock_requests_in_progress", "Answers under way.", value=self._engine.leases)
        yield GaugeMetricFamily("loradock_adapters", "Registered adapters.", value=len(self._registry.names()))
        yield CounterMetricFamily(
            "loradock_audit_failures", "Lines that the audit log lacks.", value=self._audit.failures
        )
        state = GaugeMetricFamily("loradock_adapter_state", "1 while the version is there.", labels=(*LABELS, "state"))
        resident = {residence.id for residence in self._engine.residents if residence.loaded}
        for adapter in self._registry.adapters():
            state.add_metric((adapter.name, f"v{adapter.version}", "host"), float(adapter.id in resident))
        yield state


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
