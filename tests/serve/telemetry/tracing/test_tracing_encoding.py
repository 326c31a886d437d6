from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from serve.telemetry.tracing import tracing_encoding as encoding
from serve.telemetry.tracing.tracing_sdk import SCOPE, EncodedSpans, around

RESOURCE = Resource({"service.name": "loradock", "service.instance.id": "here"})
IDS, TIMES = st.integers(1, (1 << 64) - 1), st.integers(1, 1 << 62)
TEXTS = st.text(max_size=200)
VALUES = st.one_of(
    TEXTS,
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False),
    st.lists(TEXTS, max_size=3),
)
KEYS = st.sampled_from(["vendor", "other@ours", "x"])


def sent(span: bytes):
    """What the collector reads: our span, in what surrounds it."""
    request = EncodedSpans([span], around(RESOURCE)).request()
    return type(request).FromString(request.SerializeToString())


@given(
    trace=st.integers(1, (1 << 128) - 1),
    ids=st.tuples(IDS, IDS, IDS),
    name=TEXTS,
    times=st.tuples(TIMES, TIMES),
    parent=st.sampled_from(["none", "here", "elsewhere"]),
    failed=st.booleans(),
    server=st.booleans(),
    named=st.dictionaries(TEXTS, VALUES, max_size=12),
    states=st.dictionaries(KEYS, st.text("abc", min_size=1, max_size=9), max_size=3),
    linked=st.booleans(),
)
def test_a_collector_reads_what_the_sdk_would_have_written(
    trace, ids, name, times, parent, failed, server, named, states, linked
):
    own, above, other = ids
    state = TraceState(list(states.items()))

    def context(id: int, remote: bool = False) -> SpanContext:
        return SpanContext(trace, id, remote, TraceFlags(TraceFlags.SAMPLED), state)

    theirs = ReadableSpan(
        name,
        context(own),
        None if parent == "none" else context(above, parent == "elsewhere"),
        RESOURCE,
        named,
        links=[Link(context(other, True))] if linked else [],
        kind=SpanKind.SERVER if server else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
        start_time=times[0],
        end_time=times[1],
        instrumentation_scope=SCOPE,
    )
    more = encoding.attributes(named) + encoding.state(state.items())
    if linked:
        more += encoding.link(f"{trace:032x}", f"{other:016x}")
    ours = encoding.span(
        trace.to_bytes(16, "big"),
        own.to_bytes(8, "big"),
        name,
        *times,
        parent=b"" if parent == "none" else above.to_bytes(8, "big"),
        remote=parent == "elsewhere",
        kind=encoding.SERVER if server else encoding.INTERNAL,
        failed=failed,
        more=more,
    )
    assert sent(ours) == encode_spans([theirs])


def test_text_that_is_no_unicode_costs_no_span():
    span = encoding.span(b"t" * 16, b"s" * 8, "a\ud800", 1, 2, more=encoding.attributes({"b": "c\ud800"}))
    (read,) = sent(span).resource_spans[0].scope_spans[0].spans
    assert read.name == "a?" and read.attributes[0].value.string_value == "c?"
