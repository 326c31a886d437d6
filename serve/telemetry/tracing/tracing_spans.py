"""The spans of one request, built from its Exchange when it has ended: request, queue, adapter load, engine.

    chat tone                    the request (SERVER), with model, version, tokens, status
      queue                      the wait for a seat
      load adapter               until its adapter was in the engine, if it had to be loaded
      engine                     from the seat to the last token
        prefill                  from the prompt's turn in the engine to the first token
        decode                   from the first token to the last

Names and attributes follow the GenAI conventions, where they have one; the others begin with `loradock.`. No text of a
request or an answer is in them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from serve.asgi.exchange import LEFT, Exchange
from serve.asgi.trace_context import RequestTrace
from serve.telemetry.tracing.tracing_encoding import INTERNAL, SERVER, Value, attributes, link, span, state, unrepeated
from serve.telemetry.tracing.tracing_names import TenantNames
from serve.telemetry.tracing.tracing_sdk import PROVIDER

# A load that took less was none: the adapter was there.
LOADED_SECONDS = 0.001
MAX_FINISH_REASONS = 16
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/inference/v1/generate": "text_completion",
    "/v1/embeddings": "embeddings",
}
SHADOW = "shadow"


def operation(path: str) -> str:
    """`gen_ai.operation.name` of a route: the conventions' word, or the route's own last one."""
    return OPERATIONS.get(path) or path.rstrip("/").rpartition("/")[2].strip("{}") or "request"


def error_type(exchange: Exchange) -> str | None:
    """`error.type`: why it failed, or the status of what was refused; None if it was answered or its client left."""
    if exchange.failure:
        return exchange.failure.value
    return str(exchange.status) if exchange.status >= 400 and exchange.status != LEFT else None


class Spans:
    def __init__(self, names: TenantNames) -> None:
        self._names = names

    def of(self, exchange: Exchange) -> tuple[bytes, ...]:
        """Encoded, the request's own span first; nothing for a request that was not sampled."""
        trace = exchange.trace
        if trace is None or not trace.sampled:
            return ()
        return tuple(self._spans(exchange, trace))

    def _spans(self, exchange: Exchange, trace: RequestTrace) -> Iterator[bytes]:
        yield self._request(exchange, trace)
        if exchange.version and trace.queued is not None:
            parts = _Parts(exchange, trace, _answerer(self._names.model(exchange.adapter), exchange.version))
            seated = exchange.seated
            loading = None if seated is None else seated - trace.load_seconds
            yield parts.span("queue", trace.queued, exchange.total if loading is None else loading)
            if seated is not None:
                if trace.load_seconds >= LOADED_SECONDS and exchange.id:
                    yield parts.span("load adapter", seated - trace.load_seconds, seated)
                yield from _engine(exchange, parts, seated)

    def _request(self, exchange: Exchange, trace: RequestTrace) -> bytes:
        name, model = operation(trace.path), self._names.model
        known: dict[str, Any] = {
            "gen_ai.operation.name": name,
            "gen_ai.provider.name": PROVIDER,
            **_http(exchange, trace),
        }
        known |= _known(
            {
                "gen_ai.request.model": model(trace.model),
                "gen_ai.response.model": model(exchange.id or (exchange.adapter if exchange.generations else "")),
                "gen_ai.request.stream": trace.streams,
                "loradock.role": trace.role,
                "loradock.tenant": self._names.tenant(exchange.tenant),
                "error.type": error_type(exchange),
                "loradock.auto.reason": exchange.auto.reason if exchange.auto else "",
                "loradock.auto.margin": exchange.auto.margin if exchange.auto else None,
            }
        )
        more = attributes(known | _generated(exchange, trace)) + _answerer(model(exchange.adapter), exchange.version)
        if exchange.echoed_id:
            more += unrepeated("loradock.request_id", exchange.echoed_id)
        if trace.repeats:
            more += link(trace.repeats.trace_id, trace.repeats.span_id)
        if trace.state:
            more += state(trace.state.items())
        return span(
            bytes.fromhex(trace.trace_id),
            bytes.fromhex(trace.span_id),
            # Names of spans are few: those of registered models, never what a client makes up.
            f"{name} {model(exchange.adapter)}" if exchange.version else name,
            _nanoseconds(exchange, 0.0),
            _nanoseconds(exchange, exchange.total),
            parent=bytes.fromhex(trace.parent_id),
            remote=bool(trace.parent_id),
            kind=INTERNAL if trace.role == SHADOW else SERVER,
            failed=bool(exchange.failure) or exchange.status >= 500,
            more=more,
        )


class _Parts:
    """Makes the spans inside of a request. Times are seconds from its arrival."""

    def __init__(self, exchange: Exchange, trace: RequestTrace, answerer: bytes) -> None:
        self._exchange = exchange
        self._trace_id, self._request = bytes.fromhex(trace.trace_id), bytes.fromhex(trace.span_id)
        self._common = answerer + state(trace.state.items()) if trace.state else answerer

    def span(
        self,
        name: str,
        start: float,
        end: float,
        more: dict[str, Value] | None = None,
        *,
        id: bytes | None = None,
        parent: bytes | None = None,
    ) -> bytes:
        """One, below the request's own or below `parent`."""
        return span(
            self._trace_id,
            id or span_id(),
            name,
            _nanoseconds(self._exchange, start),
            _nanoseconds(self._exchange, max(start, end)),
            parent=parent or self._request,
            more=self._common + attributes(more) if more else self._common,
        )


def span_id() -> bytes:
    """A new one."""
    return (random.getrandbits(64) or 1).to_bytes(8, "big")


@lru_cache(1024)
def _answerer(adapter: str, version: str) -> bytes:
    return attributes({"loradock.adapter": adapter, "loradock.version": version})


def _engine(exchange: Exchange, parts: _Parts, seated: float) -> Iterator[bytes]:
    tokens = _Tokens(exchange)
    end = exchange.total if tokens.last is None else max(tokens.last, seated)
    more = _known({"loradock.engine.queue_seconds": exchange.queue})
    if exchange.engine_seconds:
        more["loradock.engine.busy_seconds"] = round(exchange.engine_seconds, 6)
    engine = span_id()
    yield parts.span("engine", seated, end, more, id=engine)
    if tokens.first is None or tokens.last is None:
        return
    if tokens.began is not None:
        computed: dict[str, Value] = {
            "loradock.prefill.computed_tokens": exchange.prompt_tokens - exchange.cached_tokens
        }
        yield parts.span("prefill", max(tokens.began, seated), tokens.first, computed, parent=engine)
    count: dict[str, Value] = {"gen_ai.usage.output_tokens": exchange.generated_tokens}
    yield parts.span("decode", tokens.first, tokens.last, count, parent=engine)


class _Tokens:
    """When the engine began, sampled its first token and its last, in seconds from the request's arrival."""

    def __init__(self, exchange: Exchange) -> None:
        self.began: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        for made in exchange.generations:
            if made.first is None:
                continue
            first = min(max(made.first - exchange.began, 0.0), exchange.total)
            last = min(first + (made.gap or 0.0) * max(0, len(made.output) - 1), exchange.total)
            self.first = first if self.first is None else min(first, self.first)
            self.last = last if self.last is None else max(last, self.last)
            if made.prefill is not None:
                began = first - made.prefill
                self.began = began if self.began is None else min(began, self.began)


def _nanoseconds(exchange: Exchange, seconds: float) -> int:
    return int((exchange.began + seconds) * 1e9)


def _http(exchange: Exchange, trace: RequestTrace) -> dict[str, Any]:
    attributes: dict[str, Any] = {"http.request.method": trace.method, "http.route": trace.path}
    if exchange.status != LEFT:
        attributes["http.response.status_code"] = exchange.status
    else:
        attributes["loradock.client_left"] = True
    if trace.server:
        address, port = trace.server
        attributes["server.address"] = address
        if port:
            attributes["server.port"] = port
    return attributes


def _generated(exchange: Exchange, trace: RequestTrace) -> dict[str, Any]:
    """What the engine read and said, in numbers."""
    if not exchange.generations:
        return {}
    attributes = {
        "gen_ai.usage.input_tokens": exchange.prompt_tokens,
        "gen_ai.usage.output_tokens": exchange.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": exchange.cached_tokens,
        "gen_ai.response.finish_reasons": [
            made.finish_reason for made in exchange.generations[:MAX_FINISH_REASONS] if made.finish_reason
        ],
    }
    if exchange.first is not None and trace.streams:
        attributes["gen_ai.response.time_to_first_chunk"] = exchange.first
    if parameters := exchange.generations[0].parameters:
        attributes["gen_ai.request.max_tokens"] = parameters.max_tokens
        attributes["gen_ai.request.temperature"] = parameters.temperature
    return attributes


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None and value != ""}
