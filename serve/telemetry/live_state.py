"""What is true at the moment of a scrape: engines, adapters, and the service level objectives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.auth.audit import Audit
from serve.engine.engine import Phase
from serve.engine.fleet import Fleet
from serve.telemetry.series import LABELS, OTHER
from serve.telemetry.slo import Slo


class LiveState(Collector):
    """What is true at the moment of the scrape."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        audit: Audit,
        version: str,
        limit: int,
        labelled: Collection[tuple[str, str]],
    ) -> None:
        self._fleet = fleet
        self._audit = audit
        self._registry = registry
        self._version = version
        self._limit = limit
        self._labelled = labelled

    def collect(self) -> Iterator[Metric]:
        vllm = self._fleet.first.backend.version
        yield InfoMetricFamily(
            "loradock_build",
            "The versions of loradock and vLLM, as labels; always 1.",
            {"version": self._version, "vllm": vllm},
        )
        phase = GaugeMetricFamily(
            "loradock_engine_phase",
            "1 for the phase that the engine is in when it is scraped, 0 for the others.",
            labels=("model", "phase"),
        )
        restarts = CounterMetricFamily(
            "loradock_engine_restarts",
            "Engines that were started anew after one died or hung, since the server started.",
            labels=("model",),
        )
        line = GaugeMetricFamily(
            "loradock_line_waiting",
            "Requests in the server's own queue when it is scraped, those that no client waits for too.",
            labels=("model",),
        )
        waiting = GaugeMetricFamily(
            "loradock_engine_waiting", "Requests in the engine's own queue after its latest step.", labels=("model",)
        )
        memory = GaugeMetricFamily(
            "loradock_engine_memory_bytes",
            "Bytes of memory that the engine's processes take when they are scraped.",
            labels=("model",),
        )
        for base in self._fleet:
            for value in Phase:
                phase.add_metric((base.name, value.value), float(base.phase is value))
            restarts.add_metric((base.name,), base.restarts)
            waiting.add_metric((base.name,), base.backend.waiting)
            line.add_metric((base.name,), base.engine.queue.waiting)
            memory.add_metric((base.name,), base.backend.memory)
        yield from (phase, restarts, waiting, line, memory)
        yield GaugeMetricFamily(
            "loradock_adapters",
            "Adapters in the registry when it is scraped; one with several versions counts once.",
            value=len(self._registry.names()),
        )
        yield CounterMetricFamily(
            "loradock_audit_failures",
            "Lines that could not be written to the audit log, since the server started.",
            value=self._audit.failures,
        )
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        """State and leases of each version; beyond the limit, sums of them under `other`."""
        running = GaugeMetricFamily(
            "loradock_requests_in_progress",
            "Requests that wait for their seat or are answered when it is scraped.",
            labels=LABELS,
        )
        state = GaugeMetricFamily(
            "loradock_adapter_state",
            "1 for where the version is when it is scraped: in a slot of the batch, in the engine's memory (host), on "
            "disk alone, or not loadable (failed). For `other`, how many versions are there.",
            labels=(*LABELS, "state"),
        )
        info = GaugeMetricFamily(
            "loradock_adapter_info",
            "The digest, rank and base of a version, as labels; always 1 while it is registered.",
            labels=(*LABELS, "digest", "rank", "base"),
        )
        leases: dict[str, int] = {}
        states: dict[str, str] = {}
        for base in self._fleet:
            mine = {residence.id: residence.leases for residence in base.residents}
            running.add_metric((base.name, "base"), max(base.leases - sum(mine.values()), 0))
            leases |= mine
            states |= base.engine.states
        busy, beyond = 0, dict.fromkeys(("slot", "host", "disk", "failed"), 0)
        adapters = self._registry.adapters()
        shown = self._shown(adapters, states)
        for adapter in adapters:
            where = states.get(adapter.id, "disk")
            if adapter.id not in shown:
                busy += leases.get(adapter.id, 0)
                beyond[where] += 1
                continue
            labels = (adapter.name, f"v{adapter.version}")
            running.add_metric(labels, leases.get(adapter.id, 0))
            info.add_metric((*labels, adapter.digest[:12], str(adapter.rank), adapter.base or ""), 1)
            for place in beyond:
                state.add_metric((*labels, place), float(place == where))
        if any(beyond.values()):
            running.add_metric(OTHER, busy)
            for place, count in beyond.items():
                state.add_metric((*OTHER, place), count)
        yield from (running, state, info)

    def _shown(self, adapters: Sequence[Adapter], states: dict[str, str]) -> set[str]:
        """Ids of the versions that are named: those that are counted by name, then the rest, what is loaded first."""
        labelled = set(self._labelled)

        def first(adapter: Adapter) -> tuple[bool, bool]:
            return (adapter.name, f"v{adapter.version}") not in labelled, adapter.id not in states

        return {adapter.id for adapter in sorted(adapters, key=first)[: self._limit]}


class Objectives(Collector):
    """The service level objectives that this server was given; rules rendered from others say so by comparing."""

    def __init__(self, slos: Sequence[Slo]) -> None:
        self._slos = slos

    def collect(self) -> Iterator[Metric]:
        threshold = GaugeMetricFamily(
            "loradock_slo_threshold_seconds",
            "Seconds from which on a request is too slow for the objective; adapter * is every one without its own.",
            labels=("adapter", "slo"),
        )
        target = GaugeMetricFamily(
            "loradock_slo_target",
            "The part of an adapter's requests that must be good, 0 to 1; 0 is no objective.",
            labels=("adapter", "slo"),
        )
        for slo in self._slos:
            target.add_metric((slo.adapter, slo.objective), slo.target)
            if slo.threshold is not None:
                threshold.add_metric((slo.adapter, slo.objective), slo.threshold)
        yield threshold
        yield target
