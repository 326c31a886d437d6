"""`gen_ai.evaluation.result`: verdicts on canaries, golden scores, ratings and drift alarms as OpenTelemetry's events.

A rating belongs to the span of the request that it is about. What a drift alarm says in words is left out: it names
words that are frequent in prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from serve.asgi.trace_context import RequestTrace
from serve.telemetry.tracing.tracing_names import TenantNames
from serve.telemetry.tracing.tracing_sdk import SCOPE

NAME = "gen_ai.evaluation.result"
GOLDEN = "golden"


class Evaluations:
    """`put` takes the events, from any thread."""

    def __init__(self, put: Callable[[ReadableLogRecord], None], resource: Resource, names: TenantNames) -> None:
        self._put = put
        self._resource = resource
        self._names = names

    def happened(self, kind: str, data: Mapping[str, Any]) -> None:
        """One of the events that webhooks are told too; those that evaluate nothing are left out."""
        about = {
            **self._answerer(data.get("adapter", ""), _version(data.get("version"))),
            "loradock.tenant": self._names.tenant(data.get("tenant") or ""),
        }
        if kind.startswith("canary."):
            about |= {"loradock.compared_with": _version(data["live"])}
            name = "golden_set" if data["text"] == GOLDEN else "canary"
            self._emit(name, label=data["verdict"], explanation=data["text"], more=about)
        elif kind == "drift.alarm":
            about |= {"loradock.drift.signal": data["signal"]}
            explanation = f"{data['signal']} has drifted"
            self._emit("drift", data["log_evidence"], "drifted", explanation, about)

    def scored(self, adapter: str, version: str, score: float | None, cases: int, complete: bool) -> None:
        """A version has answered its golden set."""
        about = {**self._answerer(adapter, version), "loradock.golden.cases": cases}
        self._emit("golden_set", score, "complete" if complete else "incomplete", more=about)

    def rated(self, adapter: str, version: str, rating: float, label: str, trace: RequestTrace | None) -> None:
        """Somebody found an answer good or bad."""
        self._emit("rating", rating, label, more=self._answerer(adapter, version), trace=trace)

    def _answerer(self, adapter: str, version: str) -> dict[str, Any]:
        return {"loradock.adapter": self._names.model(adapter), "loradock.version": version}

    def _emit(
        self,
        name: str,
        value: float | None = None,
        label: str = "",
        explanation: str = "",
        more: Mapping[str, Any] | None = None,
        trace: RequestTrace | None = None,
    ) -> None:
        attributes = {
            "gen_ai.evaluation.name": name,
            "gen_ai.evaluation.score.value": value,
            "gen_ai.evaluation.score.label": label,
            "gen_ai.evaluation.explanation": explanation,
            **(more or {}),
        }
        now = time.time_ns()
        record = LogRecord(
            timestamp=now,
            observed_timestamp=now,
            context=_context(trace),
            severity_number=SeverityNumber.INFO,
            attributes={key: value for key, value in attributes.items() if value not in (None, "")},
            event_name=NAME,
        )
        self._put(ReadableLogRecord(record, self._resource, SCOPE))


def _context(trace: RequestTrace | None) -> Context:
    if trace is None or not trace.sampled:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED)
    span = SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), False, flags, trace.state)
    return set_span_in_context(NonRecordingSpan(span), Context())


def _version(version: Any) -> str:
    return f"v{version}" if isinstance(version, int) else str(version or "")
