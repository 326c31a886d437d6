"""Health, readiness, metrics and version of a running server."""

from __future__ import annotations

import re

import pytest

from serve import __version__
from tests.support.server import BASE, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_a_running_server_is_healthy_ready_and_says_its_versions(server):
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 200
    version = done(server.http.get("/version"))
    assert version["version"] == __version__
    assert version["vllm"]


def test_the_engine_is_shown_as_it_is(server, voice):
    engine = server.engine()
    assert engine["name"] == BASE
    assert engine["phase"] == "ready"
    assert server.adapter(voice)["versions"][0]["id"] in engine["resident"]
    assert all(re.fullmatch(r"[^@]+@[0-9a-f]{12}", one) for one in engine["resident"])


def test_metrics_have_vllm_s_series_and_ours(server, voice):
    server.ask(voice)
    server.ask(BASE)
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if line.startswith("vllm:generation_tokens_total") and not line.endswith(" 0.0")]
    assert [line for line in lines if line.startswith("vllm:time_to_first_token_seconds")]
    ours = [line for line in lines if line.startswith("loradock_")]
    for model in (voice, BASE):
        assert [line for line in ours if f'"{model}"' in line], f"nothing about {model}"
    assert all(re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*(\{.*\})? \S+", line) for line in lines)


def test_what_clients_send_never_becomes_a_label(server):
    names = [f"no-such-model-{number}" for number in range(20)]
    for unknown in names:
        server.http.post("/v1/chat/completions", json={"model": unknown, "messages": []})
    metrics = server.http.get("/metrics").text
    assert not [unknown for unknown in names if unknown in metrics]
