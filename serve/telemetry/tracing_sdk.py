"""The parts of OpenTelemetry's SDK that are used: exporters, resource and sampler, as its variables ask for them.

Imported only where a signal is wanted (`serve.telemetry.tracing`), as are the modules that build on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.sampling import _get_from_env_or_default
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.span import TraceState

from serve import __version__
from serve.asgi.trace_context import Parent
from serve.errors import ConfigError
from serve.telemetry.tracing_settings import GRPC, LOGS, METRICS, TRACES

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
