"""The parts of OpenTelemetry's SDK that are used: exporters, resource and sampler, as its variables ask for them.

Imported only where a signal is wanted (`serve.telemetry.tracing.tracing`), as are the modules that build on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import _get_from_env_or_default
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.span import TraceState

from serve import __version__
from serve.asgi.trace_context import Parent
from serve.errors import ConfigError
from serve.telemetry.tracing.tracing_settings import GRPC, LOGS, METRICS, TRACES

SCOPE = InstrumentationScope("loradock", __version__)
# Whose conventions are followed (https://github.com/open-telemetry/semantic-conventions-genai), and the provider there.
PROVIDER = "loradock"
_EXPORTERS = {
    TRACES: ("trace_exporter", "OTLPSpanExporter"),
    METRICS: ("metric_exporter", "OTLPMetricExporter"),
    LOGS: ("_log_exporter", "OTLPLogExporter"),
}


def exporter(signal: str, protocol: str) -> Any:
    """What sends a signal to the endpoint that the environment names; ConfigError if that cannot be."""
    module, name = _EXPORTERS[signal]
    package = "grpc" if protocol == GRPC else "http"
    try:
        return getattr(importlib.import_module(f"opentelemetry.exporter.otlp.proto.{package}.{module}"), name)()
    except ImportError:
        raise
    except Exception as error:  # whatever the variables say, the SDK has many errors for it
        raise ConfigError(f"the OTEL_ variables cannot be used for {signal}: {error}") from error


class EncodedSpans(list[bytes]):
    """Spans that are encoded already (`tracing_encoding`), for an exporter that `takes_encoded`."""

    def __init__(self, spans: Iterable[bytes], around: ExportTraceServiceRequest) -> None:
        super().__init__(spans)
        self._around = around

    def request(self) -> ExportTraceServiceRequest:
        """What is sent."""
        request = ExportTraceServiceRequest()
        request.CopyFrom(self._around)
        request.resource_spans[0].scope_spans[0].MergeFromString(b"".join(self))
        return request


def around(resource: Resource) -> ExportTraceServiceRequest:
    """What spans are sent in: who sends, and which scope they are of."""
    nobody = SpanContext(1, 1, False)
    request = encode_spans([ReadableSpan("", nobody, resource=resource, instrumentation_scope=SCOPE)])
    del request.resource_spans[0].scope_spans[0].spans[:]
    return request


def takes_encoded(exporter: Any) -> Any:
    """An exporter of spans, which from now on takes EncodedSpans too; ConfigError from an SDK that cannot."""
    module: Any = importlib.import_module(type(exporter).__module__)
    # The one function by which both exporters make a message of spans; they look at them nowhere else.
    if not hasattr(module, "encode_spans"):
        raise ConfigError(f"{module.__name__} makes messages of spans in another way: install the tested OpenTelemetry")
    module.encode_spans = _encoded
    return exporter


def _encoded(spans: Sequence[ReadableSpan] | EncodedSpans) -> ExportTraceServiceRequest:
    return spans.request() if isinstance(spans, EncodedSpans) else encode_spans(spans)


def resource(instance: str) -> Resource:
    """Who sends: loradock, or what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say."""
    ours = {"service.name": "loradock", "service.version": __version__, "service.instance.id": instance}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def sampled() -> Callable[[str, Parent | None], tuple[bool, Any]]:
    """Whether a request is traced, by its trace id and its client's span; and its tracestate.

    As OTEL_TRACES_SAMPLER and its argument say: as the client decided, and else every request.
    """
    sampler = _get_from_env_or_default()

    def decide(trace_id: str, parent: Parent | None) -> tuple[bool, Any]:
        context = Context()
        if parent:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
            state = TraceState.from_header([parent.state]) if parent.state else None
            span = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags, state)
            context = set_span_in_context(NonRecordingSpan(span), context)
        result = sampler.should_sample(context, int(trace_id, 16), "request", SpanKind.SERVER)
        return result.decision.is_sampled(), result.trace_state

    return decide
