"""The trace that a request belongs to: W3C Trace Context in and out (https://www.w3.org/TR/trace-context).

parent = Parent.of(scope)        # what the client's `traceparent` says, None without a valid one
trace = RequestTrace(...)        # what tracing keeps of one request beside its Exchange
scope = trace.forwarded(scope)   # the request as part of that trace, for whoever answers it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

# Version, trace id, parent id, flags; ids of zeros are none.
_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
# The specification asks for 512 characters at least.
_MAX_STATE = 512
_HEADERS = (b"traceparent", b"tracestate")
# Of a longer name of a model, which nobody serves, the beginning is kept.
_MAX_MODEL = 128


@dataclass(frozen=True, slots=True)
class Parent:
    """The client's span: ids in lower-case hex; `state` is its `tracestate` as it came, "" for none."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""

    @classmethod
    def of(cls, scope: Scope) -> Parent | None:
        """What the one `traceparent` header of a request says; several, or an invalid one, say nothing."""
        parents = [value for name, value in scope["headers"] if name == b"traceparent"]
        if len(parents) != 1 or not (match := _TRACEPARENT.fullmatch(parents[0])):
            return None
        version, trace_id, span_id, flags, more = match.groups()
        if version == b"00" and more:
            return None
        state = b",".join(value for name, value in scope["headers"] if name == b"tracestate")
        text = state.decode("latin-1") if len(state) <= _MAX_STATE else ""
        return cls(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & 1), text)


def trace_of(scope: Scope) -> str:
    """The trace that the client's `traceparent` header says it belongs to, or ""."""
    parent = Parent.of(scope)
    return parent.trace_id if parent else ""


@dataclass(slots=True)
class RequestTrace:
    """What tracing keeps of a request beside its Exchange. No text of the request is in it.

    `span_id` is that of the request's own span, `parent_id` that of the client's ("" without one). `path` is the
    route's, with {id} for ids. `role` says how the version was chosen. Times are seconds from the request's arrival:
    `queued` when it began to wait for its seat. `load_seconds` is how long its adapter then took to load.
    """

    trace_id: str
    span_id: str
    sampled: bool
    parent_id: str = ""
    # The tracestate as the sampler left it.
    state: Any = None
    method: str = "POST"
    path: str = ""
    server: tuple[str, int | None] | None = None
    model: str = ""
    streams: bool = False
    role: str = ""
    queued: float | None = None
    load_seconds: float = 0.0
    # The trace of the request that this one repeats.
    repeats: RequestTrace | None = None
    # The engine makes spans of its own.
    engine_traces: bool = False

    @property
    def header(self) -> str:
        """A `traceparent` that names the request's own span."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def asked(self, model: Any, stream: Any) -> None:
        """Say which model the request names, and whether it wants a stream."""
        self.model = model[:_MAX_MODEL] if isinstance(model, str) else ""
        self.streams = stream is True

    def forwarded(self, scope: Scope) -> Scope:
        """The request below the request's own span, if the engine makes spans."""
        if not self.engine_traces:
            return scope
        headers = [header for header in scope["headers"] if header[0] not in _HEADERS]
        return {**scope, "headers": [*headers, (b"traceparent", self.header.encode())]}
