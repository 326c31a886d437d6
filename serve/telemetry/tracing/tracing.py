"""OpenTelemetry: traces of requests, `gen_ai.server.*` metrics and evaluation events, by OTLP to a collector.

    tracing = open_tracing(config.otel, ...)     # None unless OTEL_EXPORTER_OTLP_ENDPOINT or a variant is set
    trace = tracing.begin(scope)                 # when a request arrives: ids, and whether it is sampled
    tracing.take(exchange)                       # when it has ended

A request costs the event loop its ids and one offer to a queue. Spans are built from the Exchange in a thread and sent
from another. Nothing of OpenTelemetry is imported before `open_tracing` finds that it is wanted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from serve.asgi.exchange import Exchange
from serve.asgi.exchange_worker import LINGER_SECONDS, ExchangeWorker
from serve.asgi.trace_context import Parent, RequestTrace
from serve.errors import ConfigError
from serve.events import GoldenScored, Notice
from serve.telemetry.export_queue import FLUSH_SECONDS, ExportQueue
from serve.telemetry.tracing.tracing_names import TenantNames
from serve.telemetry.tracing.tracing_settings import LOGS, METRICS, TRACES, TracingSettings

EVENTS_QUEUE = 10_000
# Requests that were refused before they were read, as those without a key, that have a span.
STRANGERS_PER_SECOND = 20
STORED = "/v1/responses/"
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


# Whether a request is traced, by its trace id and its client's span; and its tracestate.
Sampled: TypeAlias = Callable[[str, Parent | None], tuple[bool, Any]]


class Tracing(Collector):
    """`begin`, `again` and `take` belong to the event loop; `happened`, `scored` and `rated` may come from any thread.

    Of the parts, those whose signal is not wanted are None. `engine_traces`: vLLM makes spans of its own.
    `linger`: for so many seconds requests wait for others, before their spans are built.
    """

    def __init__(
        self,
        sampled: Sampled | None,
        spans: Any = None,
        traces: ExportQueue[Any] | None = None,
        metrics: Any = None,
        evaluations: Any = None,
        events: ExportQueue[Any] | None = None,
        *,
        engine_traces: bool = False,
        linger: float = LINGER_SECONDS,
    ) -> None:
        self._sampled = sampled
        self._traces = traces
        self._metrics = metrics
        self._evaluations, self._events = evaluations, events
        self._engine_traces = engine_traces
        self._worker = ExchangeWorker([_Built(spans, traces, metrics)], name="otel", linger=linger)

    def begin(self, scope: Scope) -> RequestTrace:
        """The trace of a request that has just arrived: its client's, or a new one."""
        parent = Parent.of(scope)
        trace_id = parent.trace_id if parent else f"{random.getrandbits(128) or 1:032x}"
        sampled, state = self._sampled(trace_id, parent) if self._sampled else (False, None)
        path, server = scope["path"], scope.get("server")
        return RequestTrace(
            trace_id,
            f"{random.getrandbits(64) or 1:016x}",
            sampled,
            parent.span_id if parent else "",
            state,
            scope["method"] if scope["method"] in METHODS else "_OTHER",
            _route(path),
            (str(server[0]), server[1]) if server else None,
            engine_traces=self._engine_traces,
        )

    def again(self, trace: RequestTrace | None, role: str) -> RequestTrace | None:
        """A trace of its own for an answer that no client waits for, linked to the request that it repeats."""
        if trace is None or not trace.sampled:
            return None
        trace_id, span_id = f"{random.getrandbits(128) or 1:032x}", f"{random.getrandbits(64) or 1:016x}"
        again = RequestTrace(trace_id, span_id, True, path=trace.path, model=trace.model, role=role)
        again.repeats = trace
        return again

    def take(self, exchange: Exchange) -> None:
        """Have the spans of an exchange built and sent, and its latencies counted; it never waits."""
        if exchange.trace is not None and (exchange.trace.sampled or self._metrics):
            self._worker.offer(exchange)

    def happened(self, notice: Notice) -> None:
        """A verdict on a canary, or a drift alarm, as webhooks are told."""
        if self._evaluations:
            self._evaluations.happened(notice.kind, notice.data())

    def scored(self, run: GoldenScored) -> None:
        """A version has answered its golden set."""
        if self._evaluations:
            self._evaluations.scored(run.adapter, f"v{run.version}", run.score, run.cases, run.complete)

    def rated(self, adapter: str, version: str, rating: float, label: str, trace: RequestTrace | None) -> None:
        """Somebody rated an answer; `trace` is that of the request."""
        if self._evaluations:
            self._evaluations.rated(adapter, version, rating, label, trace)

    def start(self) -> None:
        """Start the threads. Blocks."""
        for part in self._parts():
            part.start()
        self._worker.start()

    def stop(self) -> None:
        """Send what is there, for some seconds at most. Blocks."""
        self._worker.stop()
        end = time.monotonic() + FLUSH_SECONDS
        for part in self._parts():
            part.ask_to_stop()
        for part in self._parts():
            part.stop(max(0.0, end - time.monotonic()))

    def settle(self) -> None:
        """Return when the spans of everything that was taken wait to be sent. Blocks."""
        self._worker.settle()

    def collect(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily(
            "loradock_otel_dropped",
            "Traces of requests, or events (logs), that were dropped because too many waited for the collector.",
            labels=("signal",),
        )
        delivered = CounterMetricFamily(
            "loradock_otel_delivered",
            "Traces of requests, or events (logs), that the OpenTelemetry collector has taken.",
            labels=("signal",),
        )
        waiting = GaugeMetricFamily(
            "loradock_otel_waiting",
            "Traces of requests, or events (logs), that wait for the OpenTelemetry collector when it is scraped.",
            labels=("signal",),
        )
        for signal, queue in ((TRACES, self._traces), (LOGS, self._events)):
            if queue:
                unseen = self._worker.dropped if signal == TRACES else 0
                dropped.add_metric((signal,), queue.dropped + unseen)
                delivered.add_metric((signal,), queue.delivered)
                waiting.add_metric((signal,), queue.waiting)
        yield from (dropped, delivered, waiting)

    def _parts(self) -> list[Any]:
        return [part for part in (self._traces, self._events, self._metrics) if part]


class _Built:
    """The worker's observer: what becomes of a finished exchange."""

    def __init__(
        self,
        spans: Any,
        traces: ExportQueue[Any] | None,
        metrics: Any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spans = spans
        self._traces = traces
        self._metrics = metrics
        self._clock = clock
        # The second of the last stranger's request, and how many that second has had.
        self._strangers = (0, 0)

    def start(self) -> None: ...

    def observe(self, exchange: Exchange) -> None:
        if self._traces and (exchange.tenant or self._takes_stranger()) and (spans := self._spans.of(exchange)):
            self._traces.put(spans)
        if self._metrics:
            self._metrics.record(exchange)

    def _takes_stranger(self) -> bool:
        """Whether one more that was refused unread has a span now: a flood of them drives no others out."""
        now = int(self._clock())
        second, count = self._strangers
        self._strangers = (now, count + 1 if second == now else 1)
        return self._strangers[1] <= STRANGERS_PER_SECOND

    def looked(self) -> None: ...

    def save(self) -> None: ...

    def stop(self) -> None: ...


def open_tracing(
    settings: TracingSettings,
    *,
    tenant: str,
    instance: str,
    label: Callable[[str, str], tuple[str, str]],
    engine_traces: bool = False,
) -> Tracing | None:
    """What the settings ask for; ConfigError if it cannot be had.

    tenant: how tenants are named in spans: name, hash or none. instance: this server among others. label: the bounded
    labels of a version.
    """
    if not settings.wanted:
        return None
    try:
        return _opened(settings, tenant, instance, label, engine_traces)
    except ImportError as missing:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for OpenTelemetry, which is not installed ({missing.name}): "
            "pip install 'loradock[otel]', or unset the variable"
        ) from missing


def _opened(
    settings: TracingSettings,
    tenant: str,
    instance: str,
    label: Callable[[str, str], tuple[str, str]],
    engine_traces: bool,
) -> Tracing:
    from serve.telemetry.tracing import tracing_sdk
    from serve.telemetry.tracing.tracing_events import Evaluations
    from serve.telemetry.tracing.tracing_metrics import ServerMetrics
    from serve.telemetry.tracing.tracing_spans import Spans

    resource = tracing_sdk.resource(instance)
    names = TenantNames(tenant)
    protocols = settings.protocols
    sampled = spans = traces = metrics = evaluations = events = None
    if TRACES in protocols:
        sampled = tracing_sdk.sampled()
        spans = Spans(names)
        around = tracing_sdk.around(resource)
        traces = _queue(
            TRACES,
            tracing_sdk.takes_encoded(tracing_sdk.exporter(TRACES, protocols[TRACES])),
            lambda requests: tracing_sdk.EncodedSpans(chain.from_iterable(requests), around),
            settings,
            settings.queue_size,
            len,
        )
    if METRICS in protocols:
        exporter = tracing_sdk.exporter(METRICS, protocols[METRICS])
        metrics = ServerMetrics(exporter, resource, names, label, settings.metric_interval)
    if LOGS in protocols:
        exporter = tracing_sdk.exporter(LOGS, protocols[LOGS])
        events = _queue(LOGS, exporter, list, settings, EVENTS_QUEUE, lambda event: 1)
        evaluations = Evaluations(events.put, resource, names)
    # They are sent together after that delay anyway: built together they take less time.
    linger = min(LINGER_SECONDS, settings.delay)
    return Tracing(sampled, spans, traces, metrics, evaluations, events, engine_traces=engine_traces, linger=linger)


def _queue(
    name: str,
    exporter: Any,
    flat: Callable[[Sequence[Any]], list[Any]],
    settings: TracingSettings,
    size: int,
    weigh: Callable[[Any], int],
) -> ExportQueue[Any]:
    def export(items: Sequence[Any]) -> bool:
        return exporter.export(flat(items)).name == "SUCCESS"

    batch, delay = settings.batch_size, settings.delay
    return ExportQueue(name, export, exporter.shutdown, size=size, batch=batch, delay=delay, weigh=weigh)


def _route(path: str) -> str:
    """The path with {id} for the id of a stored response; what nobody serves is not repeated."""
    if path.startswith(STORED):
        return STORED + "{id}" + ("/cancel" if path.endswith("/cancel") else "")
    return path[:64]
