"""What a collector gets of requests to the real engine."""

from __future__ import annotations

import secrets

import pytest

from tests.support.collector import Collector
from tests.support.server import Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine


def test_traces_show_the_wait_the_load_and_the_engine_of_each_version(
    server: Server, collector: Collector, name: str, adapters
):
    """Of a version that is loaded for the request, and of a canary; nothing of vLLM's own start is traced."""
    server.upload(name, adapters["alpha"]).raise_for_status()
    server.upload(name, adapters["bravo"]).raise_for_status()
    assert eventually(lambda: len(server.resident(name)) == 1), "the first version is out of the engine"
    loaded, dealt = secrets.token_hex(16), secrets.token_hex(16)
    ask(server, f"{name}@v1", loaded)
    server.http.post(f"/v1/adapters/{name}/canary", json={"version": 1, "weight": 1}).raise_for_status()
    ask(server, name, dealt)
    assert eventually(lambda: {loaded, dealt} <= collector.traces().keys())
    traces = collector.traces()
    for trace, role in ((loaded, "pinned"), (dealt, "canary")):
        spans = {span["name"]: span for span in traces[trace]}
        request = spans[f"chat {name}"]
        assert request["parent"] == "00f067aa0ba902b7"
        assert {"queue", "engine", "prefill", "decode"} <= spans.keys()
        about = {"loradock.adapter": name, "loradock.version": "v1"}
        assert all(span["attributes"].items() >= about.items() for span in spans.values())
        assert all(request["start"] <= span["start"] <= span["end"] <= request["end"] for span in spans.values())
        assert spans["prefill"]["start"] < spans["prefill"]["end"] == spans["decode"]["start"] < spans["decode"]["end"]
        attributes = request["attributes"]
        assert (attributes["loradock.role"], attributes["gen_ai.usage.output_tokens"]) == (role, 8)
        assert (
            attributes["gen_ai.response.finish_reasons"] == ["length"] and attributes["gen_ai.usage.input_tokens"] > 5
        )
    assert "load adapter" in {span["name"] for span in traces[loaded]}
    assert {span["scope"] for span in collector.spans()} == {"loradock"}


def ask(server: Server, model: str, trace: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 8}
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    fields = {"ignore_eos": True, "stream": True}
    server.http.post("/v1/chat/completions", json={**body, **fields}, headers=headers).raise_for_status()
