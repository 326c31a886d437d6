"""`gen_ai.server.*`: latencies of requests as the GenAI conventions have them, sent by OTLP beside Prometheus.

https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md. Labels are bounded
as those in Prometheus are. The sums are cumulative unless the environment asks for deltas, so an interval in which the
collector was gone loses nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricReader, MetricsData
from opentelemetry.sdk.resources import Resource

from serve import __version__
from serve.asgi.exchange import Exchange
from serve.telemetry.tracing.tracing_names import TenantNames
from serve.telemetry.tracing.tracing_sdk import PROVIDER
from serve.telemetry.tracing.tracing_spans import SHADOW, error_type, operation

log = logging.getLogger(__name__)

# Those that the conventions name, in seconds.
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
OUTPUT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class _Reader(MetricReader):
    """Hands what it reads to the exporter. The SDK's periodic reader starts a thread in every fork of this process."""

    def __init__(self, exporter: Any) -> None:
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)
        self._exporter = exporter
        self.delivered = True

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: Any) -> None:
        self.delivered = self._exporter.export(metrics_data) is MetricExportResult.SUCCESS

    def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None:
        self._exporter.shutdown()


class ServerMetrics:
    """`record` and `send` belong to threads. `label` gives the bounded labels of a version."""

    def __init__(
        self,
        exporter: Any,
        resource: Resource,
        names: TenantNames,
        label: Callable[[str, str], tuple[str, str]],
        interval: float,
    ) -> None:
        self._names = names
        self._reader = _Reader(exporter)
        self._label = label
        self._interval = interval
        self._provider = MeterProvider([self._reader], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("loradock", __version__)

        def histogram(name: str, description: str, bounds: tuple[float, ...]) -> Any:
            advised = list(bounds)
            return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=advised)

        self._duration = histogram(
            "gen_ai.server.request.duration",
            "Generative AI server request duration such as time-to-last byte or last output token.",
            DURATION,
        )
        self._first = histogram(
            "gen_ai.server.time_to_first_token",
            "Time to generate first token for successful responses.",
            FIRST_TOKEN,
        )
        self._gap = histogram(
            "gen_ai.server.time_per_output_token",
            "Time per output token generated after the first token for successful responses.",
            OUTPUT_TOKEN,
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otel-metrics", daemon=True)

    def record(self, exchange: Exchange) -> None:
        """Count one client's request."""
        trace = exchange.trace
        if trace is None or trace.role == SHADOW:
            return
        adapter, version = self._label(exchange.adapter, exchange.version)
        adapter = self._names.model(adapter)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation(trace.path),
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": adapter,
        }
        if version:
            attributes["gen_ai.response.model"] = adapter if version == "base" else f"{adapter}@{version}"
        if trace.server:
            attributes["server.address"] = trace.server[0]
            if trace.server[1]:
                attributes["server.port"] = trace.server[1]
        failure = error_type(exchange)
        self._duration.record(exchange.total, {**attributes, "error.type": failure} if failure else attributes)
        if exchange.status == 200 and failure is None:
            if exchange.first is not None and exchange.generations:
                self._first.record(exchange.first, attributes)
            if exchange.gap is not None:
                self._gap.record(exchange.gap, attributes)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        self._stopping.set()

    def stop(self, seconds: float) -> None:
        """Send the last values, if the collector takes them within so many seconds."""
        self.ask_to_stop()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._provider.shutdown()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self._send()
        self._send()

    def _send(self) -> None:
        before = self._reader.delivered
        try:
            self._reader.collect()
        except Exception:  # the next interval has all of it again
            log.exception("the metrics were not sent")
            self._reader.delivered = False
        if before and not self._reader.delivered:
            log.warning("the collector does not take metrics: the next interval sends the sums again")
