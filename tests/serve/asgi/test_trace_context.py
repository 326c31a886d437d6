from __future__ import annotations

import pytest

from serve.asgi.trace_context import Parent, RequestTrace, trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def scope(*headers: tuple[str, str]) -> dict:
    return {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers]}


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True), ("02", False)])
def test_the_clients_span_and_its_decision_are_read(flags, sampled):
    parent = Parent.of(
        scope(("traceparent", f"00-{TRACE}-{SPAN}-{flags}"), ("tracestate", "a=1"), ("tracestate", "b=2"))
    )
    assert parent == Parent(TRACE, SPAN, sampled, "a=1,b=2")


@pytest.mark.parametrize(
    "header",
    [
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_says_nothing(header):
    assert Parent.of(scope(("traceparent", header))) is None
    assert trace_of(scope(("traceparent", header))) == ""


def test_a_later_version_may_say_more_and_two_headers_say_nothing():
    assert trace_of(scope(("traceparent", f"01-{TRACE}-{SPAN}-01-more"))) == TRACE
    twice = ("traceparent", f"00-{TRACE}-{SPAN}-01")
    assert Parent.of(scope(twice, twice)) is None


def test_a_tracestate_that_is_too_long_is_left_out():
    parent = Parent.of(scope(("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=" + "x" * 600)))
    assert parent is not None and parent.state == ""


def test_the_engine_is_handed_the_requests_own_span_if_it_makes_spans():
    asked = scope(("traceparent", f"00-{TRACE}-{'1' * 16}-01"), ("tracestate", "a=1"), ("x", "y"))
    trace = RequestTrace(TRACE, SPAN, True)
    assert trace.forwarded(asked) is asked
    trace.engine_traces = True
    assert trace.forwarded(asked)["headers"] == [(b"x", b"y"), (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())]


def test_of_a_model_that_nobody_serves_little_is_kept():
    trace = RequestTrace(TRACE, SPAN, True)
    trace.asked("x" * 10_000, True)
    assert (len(trace.model), trace.streams) == (128, True)
    trace.asked({"not": "a name"}, "yes")
    assert (trace.model, trace.streams) == ("", False)
