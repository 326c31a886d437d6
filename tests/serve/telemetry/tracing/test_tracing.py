"""The whole server over a fake engine, and a real OTLP receiver in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.asgi.exchange import Generation, Parameters
from serve.config import Config, keys_hashed
from serve.errors import ConfigError
from serve.events import CanaryJudged, CanaryVerdict, DriftAlarm, GoldenScored, RollbackAttempted
from serve.sequential.sequential_test import Verdict
from serve.telemetry.tracing.tracing_settings import TracingSettings
from tests.support.app import CHAT, ask, canary, issued, push_two, upload
from tests.support.backend import FakeBackend
from tests.support.server import ROOT, environment

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from tests.support.collector import Collector
from tests.support.waiting import settled

SERVER, INTERNAL = 2, 1
ERROR = 2
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    with Collector(tmp_path_factory.mktemp("collector")) as collector:
        yield collector


@pytest.fixture
def collector(started: Collector) -> Collector:
    started.forget()
    return started


@pytest.fixture
def traced(
    config: Config, backend: FakeBackend, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """`traced(OTEL_...="...")`: a configuration that sends everything to the collector, soon."""

    def settings(**variables: str) -> Config:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "20", **variables}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return replace(config, otel=TracingSettings.of(environ))

    backend.generate = generated
    return settings


def generated(body: dict[str, Any]) -> Generation:
    """Three tokens for five, the first of them now."""
    return Generation(
        [1, 2, 3, 4, 5],
        [6, 7, 8],
        "stop",
        "hush",
        queue=0.001,
        first=time.time(),
        gap=0.0,
        worst_gap=0.0,
        cached=2,
        parameters=Parameters(64, 0.5),
        prefill=0.0005,
    )


async def one_trace(collector: Collector) -> dict[str, dict[str, Any]]:
    """The spans of the only trace, by name."""
    assert await settled(lambda: any(not span["parent"] or span["parent"] == SPAN for span in collector.spans()))
    (spans,) = collector.traces().values()
    return {span["name"]: span for span in spans}


async def test_a_trace_over_a_canary_shows_queue_load_and_engine_with_adapter_and_version(
    traced, connect, collector, backend, make_adapter
):
    backend.max_resident = 1
    async with connect(traced()) as client:
        _, second = await push_two(client, make_adapter)
        assert (await canary(client, 1)).status_code == 200
        await ask(client, "tone@v1")  # the engine has room for one
        assert await settled(lambda: len(collector.traces()) == 1)
        collector.forget()
        assert (await ask(client, "tone", stream=True)).status_code == 200
        spans = await one_trace(collector)
    request = spans["chat tone"]
    assert set(spans) == {"chat tone", "queue", "load adapter", "engine", "prefill", "decode"}
    for span in spans.values():
        assert span["attributes"].items() >= {"loradock.adapter": "tone", "loradock.version": "v2"}.items()
        assert request["start"] <= span["start"] <= span["end"] <= request["end"], span["name"]
    for name in ("queue", "load adapter", "engine"):
        assert (spans[name]["parent"], spans[name]["kind"]) == (request["span_id"], INTERNAL)
    assert spans["prefill"]["parent"] == spans["decode"]["parent"] == spans["engine"]["span_id"]
    assert spans["queue"]["end"] <= spans["load adapter"]["start"]
    assert spans["load adapter"]["end"] <= spans["engine"]["start"]
    assert spans["prefill"]["end"] == spans["decode"]["start"]
    assert (request["parent"], request["kind"]) == ("", SERVER)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "loradock",
        "gen_ai.request.model": "tone",
        "gen_ai.response.model": second,
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ["stop"],
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "loradock.role": "canary",
        "loradock.tenant": "default",
    }
    assert request["attributes"].items() >= expected.items()
    assert "error.type" not in request["attributes"]
    assert request["resource"].items() >= {"service.name": "loradock"}.items() and request["scope"] == "loradock"


async def test_how_a_version_was_chosen_is_its_role(traced, connect, collector, make_adapter):
    async with connect(traced()) as client:
        await push_two(client, make_adapter)
        for model in ("tone", "tone@v2", "base"):
            await ask(client, model)
        asked = {"live": ("tone", "v1"), "pinned": ("tone", "v2"), "base": ("base", "base")}
        assert await settled(lambda: len(collector.traces()) == 3)
    for role, (adapter, version) in asked.items():
        (span,) = collector.spans(loradock__role=role)
        about = {"loradock.adapter": adapter, "loradock.version": version}
        assert span["attributes"].items() >= about.items()


async def test_the_clients_trace_goes_on_here_and_the_answer_says_which_span_it_was(
    traced, connect, collector, backend
):
    async with connect(traced()) as client:
        headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
        answer = await client.post(CHAT, json={"model": "base"}, headers=headers)
        spans = await one_trace(collector)
    request = spans["chat base"]
    assert (request["trace_id"], request["parent"], request["state"]) == (TRACE, SPAN, "vendor=1")
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{request['span_id']}-01"
    assert backend.headers[-1]["traceparent"] == PARENT, "vLLM makes no spans: nothing is rewritten for it"


async def test_an_engine_that_makes_spans_makes_them_below_the_requests(traced, connect, collector, backend):
    config = replace(traced(), engine={"otlp_traces_endpoint": collector.url})
    async with connect(config) as client:
        answer = await client.post(CHAT, json={"model": "base"}, headers={"traceparent": PARENT})
        await client.post(CHAT, json={"model": "base"})
    first, second = (headers["traceparent"] for headers in backend.headers[-2:])
    assert first == answer.headers["traceresponse"] and first.startswith(f"00-{TRACE}-") and SPAN not in first
    assert not second.startswith(f"00-{TRACE}-")


async def test_a_request_whose_client_does_not_sample_is_not_traced(traced, connect, collector):
    async with connect(traced()) as client:
        unsampled = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
        answer = await client.post(CHAT, json={"model": "base"}, headers=unsampled)
        await client.post(CHAT, json={"model": "base"})
        spans = await one_trace(collector)
    assert spans["chat base"]["trace_id"] != TRACE
    assert "traceresponse" not in answer.headers


async def test_the_sampler_the_name_and_the_headers_are_those_of_the_standard_variables(traced, connect, collector):
    config = traced(
        OTEL_TRACES_SAMPLER="parentbased_always_off",
        OTEL_SERVICE_NAME="chatter",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test,service.instance.id=seven",
        OTEL_EXPORTER_OTLP_HEADERS="x-api-key=abc",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    )
    async with connect(config) as client:
        await client.post(CHAT, json={"model": "base"})
        await client.post(CHAT, json={"model": "base"}, headers={"traceparent": PARENT})
        spans = await one_trace(collector)
    request = spans["chat base"]
    assert request["trace_id"] == TRACE
    resource = {"service.name": "chatter", "deployment.environment": "test", "service.instance.id": "seven"}
    assert request["resource"].items() >= resource.items()
    assert (request["headers"]["x-api-key"], request["headers"]["content-encoding"]) == ("abc", "gzip")


async def test_what_is_refused_has_a_span_with_its_status_and_no_name_that_clients_make_up(traced, connect, collector):
    config = replace(traced(), admin_keys=keys_hashed(["run"]))
    async with connect(config) as client:
        assert (await client.post(CHAT, json={"model": "base"})).status_code == 401
        client.headers["authorization"] = "Bearer run"
        assert (await client.post(CHAT, content=b"{")).status_code == 400
        assert (await ask(client, "made-up-name")).status_code == 404
        limited = await issued(client, "acme", "inference", requests_per_minute=1)
        assert [(await ask(limited, "base")).status_code for _ in range(2)] == [200, 429]
        await limited.aclose()
        assert await settled(lambda: len(collector.traces()) == 5)
    refused = [span for span in collector.spans() if span["attributes"].get("error.type")]
    statuses = sorted((span["attributes"]["http.response.status_code"], span["name"]) for span in refused)
    assert statuses == [(400, "chat"), (401, "chat"), (404, "chat"), (429, "chat")]
    assert {span["attributes"]["error.type"] for span in refused} == {"400", "401", "404", "429"}
    assert all(span["status"] != ERROR for span in refused), "the client's mistake is no error of the server's"
    (unknown,) = collector.spans(error__type="404")
    assert unknown["attributes"]["gen_ai.request.model"] == "made-up-name"


async def test_a_flood_without_keys_drives_no_others_spans_out(traced, connect, collector):
    async with connect(replace(traced(), admin_keys=keys_hashed(["run"]))) as client:
        (built,) = client._transport.app.state.parts.tracing._worker._observers
        built._clock = lambda: 7.0
        for _ in range(60):
            assert (await ask(client, "base")).status_code == 401
        client.headers["authorization"] = "Bearer run"
        await ask(client, "base")
        assert await settled(lambda: collector.spans(loradock__role="base"))
    assert len(collector.spans(error__type="401")) == 20


async def test_an_answer_that_breaks_off_is_an_error(traced, connect, collector, backend):
    backend.generate = lambda body: Generation([1], [2], "error")
    async with connect(traced()) as client:
        await ask(client, "base")
        spans = await one_trace(collector)
    assert spans["chat base"]["status"] == ERROR and spans["chat base"]["attributes"]["error.type"] == "error"


async def test_nothing_of_what_is_said_leaves_the_server(traced, connect, collector, backend):
    backend.say = lambda body: "the answer is forty-two"
    async with connect(replace(traced(), capture=True)) as client:
        secret = {"role": "user", "content": "my password is swordfish"}
        await client.post(CHAT, json={"model": "base", "messages": [secret], "user": "jane", "stop": ["mackerel"]})
        assert await settled(lambda: collector.spans())
    sent = collector.text()
    assert "input_tokens" in sent
    assert not [word for word in ("swordfish", "forty", "hush", "jane", "mackerel") if word in sent]


@pytest.mark.parametrize(
    ("how", "shown"), [("name", "acme"), ("hash", hashlib.sha256(b"acme").hexdigest()[:16]), ("none", None)]
)
async def test_a_tenant_is_named_as_it_was_chosen_in_its_adapters_names_too(
    traced, connect, collector, make_adapter, how, shown
):
    settings = traced(OTEL_METRIC_EXPORT_INTERVAL="50")
    config = replace(settings, admin_keys=keys_hashed(["run"]), otel_tenant=how)
    async with connect(config) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme = await issued(operator, "acme", "inference", "adapters:write")
        assert (await acme.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        for model in ("tone", "acme/tone"):
            assert (await acme.post(CHAT, json={"model": model}, headers={"x-request-id": "r-1"})).status_code == 200
        assert (await acme.post("/v1/feedback", json={"request_id": "r-1", "rating": 1})).status_code == 200
        await acme.aclose()
        assert await settled(lambda: len(collector.traces()) == 2 and collector.received("logs"))
        assert await settled(lambda: collector.received("metrics"))
    name = f"{shown}/tone" if shown else "tone"
    requests = collector.spans(loradock__role="live")
    assert {(span["name"], span["attributes"]["loradock.adapter"]) for span in requests} == {(f"chat {name}", name)}
    assert {span["attributes"].get("loradock.tenant") for span in requests} == {shown}
    assert ("acme" in collector.text()) == (how == "name")


async def test_a_shadow_answers_in_a_trace_of_its_own_that_leads_to_the_clients(
    traced, connect, collector, backend, make_adapter
):
    async with connect(traced()) as client:
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
        backend.say = lambda body: "yes"
        await client.post(CHAT, json={"model": "tone", "messages": []}, headers={"traceparent": PARENT})
        assert await settled(lambda: collector.spans(loradock__role="shadow"))
        assert "traceparent" not in backend.headers[-1], "the engine is told nothing of the client's trace"
    (shadow,) = collector.spans(loradock__role="shadow")
    (request,) = collector.spans(loradock__role="live")
    assert request["trace_id"] == TRACE != shadow["trace_id"]
    assert (shadow["name"], shadow["kind"], shadow["parent"], shadow["links"]) == ("chat tone", INTERNAL, "", [TRACE])
    assert shadow["attributes"]["loradock.version"] == "v2"
    names = {span["name"] for span in collector.traces()[shadow["trace_id"]]}
    assert {"queue", "engine"} <= names


async def test_an_exemplar_leads_to_the_trace_also_where_the_client_has_none(traced, connect, collector):
    async with connect(traced()) as client:
        await client.post(CHAT, json={"model": "base"}, headers={"x-request-id": "r-1"})
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        metrics = (await client.get("/metrics", headers=accept)).text
        spans = await one_trace(collector)
    assert f'request_id="r-1",trace_id="{spans["chat base"]["trace_id"]}"' in metrics


async def test_latencies_are_sent_as_the_conventions_have_them(traced, connect, collector, make_adapter):
    async with connect(traced(OTEL_METRIC_EXPORT_INTERVAL="100")) as client:
        await push_two(client, make_adapter)
        for model in ("tone", "tone", "nobody"):
            await ask(client, model)

        def latest(name: str, **attributes: str) -> dict[str, Any]:
            points = [point for point in collector.received("metrics") if point["name"] == name]
            return ([{}] + [point for point in points if attributes.items() <= point["attributes"].items()])[-1]

        duration = "gen_ai.server.request.duration"
        tone = {"gen_ai.request.model": "tone", "gen_ai.operation.name": "chat"}
        assert await settled(lambda: latest(duration, **tone).get("count") == 2)
        refused = {"gen_ai.request.model": "other", "error.type": "404"}
        assert await settled(lambda: latest(duration, **refused).get("count") == 1)
    point = latest(duration, **tone)
    assert point["unit"] == "s" and point["bounds"][:3] == [0.01, 0.02, 0.04] and point["bounds"][-1] == 81.92
    assert point["attributes"]["gen_ai.response.model"] == "tone@v1" and "error.type" not in point["attributes"]
    assert latest("gen_ai.server.time_to_first_token", **tone)["count"] == 2
    assert latest("gen_ai.server.time_per_output_token", **tone)["count"] == 2
    assert not latest("gen_ai.server.time_to_first_token", **refused)


async def test_a_rating_belongs_to_the_span_of_the_answer(traced, connect, collector):
    async with connect(traced()) as client:
        await client.post(CHAT, json={"model": "base"}, headers={"x-request-id": "r-1"})
        rated = await client.post("/v1/feedback", json={"request_id": "r-1", "rating": 0.25})
        assert rated.status_code == 200
        assert await settled(lambda: collector.received("logs"))
        spans = await one_trace(collector)
    (event,) = collector.received("logs")
    request = spans["chat base"]
    assert (event["name"], event["trace_id"], event["span_id"]) == (
        "gen_ai.evaluation.result",
        request["trace_id"],
        request["span_id"],
    )
    assert event["attributes"] == {
        "gen_ai.evaluation.name": "rating",
        "gen_ai.evaluation.score.value": 0.25,
        "gen_ai.evaluation.score.label": "bad",
        "loradock.adapter": "base",
        "loradock.version": "base",
    }


async def test_verdicts_golden_scores_and_drift_alarms_are_evaluations(traced, connect, collector):
    async with connect(replace(traced(), otel_tenant="none")) as client:
        parts = client._transport.app.state.parts
        verdict = CanaryVerdict("acme/tone", 1, 2, Verdict.WORSE, "latency", {})
        rolled_back = ("acme/tone", 2, "alert", "rolled_back", "from 2 to 1", {}, True, 200)
        for event in (
            CanaryJudged(verdict),
            DriftAlarm("acme/tone", "v2", "prompts", {}, 9.5, {"text": "about swordfish"}),
            RollbackAttempted(*rolled_back),
            GoldenScored("acme/tone", 2, 0.75, 8, True),
        ):
            parts.events.publish(event)
        assert await settled(lambda: len(collector.received("logs")) == 3)
    events = {event["attributes"]["gen_ai.evaluation.name"]: event for event in collector.received("logs")}
    about = {"loradock.adapter": "tone", "loradock.version": "v2"}
    result = "gen_ai.evaluation."
    assert events["canary"]["attributes"] == {
        **about,
        "gen_ai.evaluation.name": "canary",
        f"{result}score.label": "worse",
        f"{result}explanation": "latency",
        "loradock.compared_with": "v1",
    }
    assert events["drift"]["attributes"].items() >= {**about, f"{result}score.value": 9.5}.items()
    assert events["golden_set"]["attributes"].items() >= {**about, f"{result}score.value": 0.75}.items()
    assert all(event["trace_id"] == "" for event in events.values())
    assert "swordfish" not in collector.text() and "acme" not in collector.text()


async def test_a_thousand_requests_lose_no_span_while_the_collector_is_gone_and_slow(
    traced, connect, collector, backend
):
    async with connect(traced()) as client:
        parts = client._transport.app.state.parts

        async def some(count: int) -> None:
            answers = await asyncio.gather(*(ask(client, "base") for _ in range(count)))
            assert {answer.status_code for answer in answers} == {200}

        def roots() -> int:
            return len(collector.spans(loradock__role="base"))

        await some(100)
        assert await settled(lambda: roots() == 100)
        collector.stop()
        for _ in range(8):
            await some(100)
        collector.start()
        collector.behave(seconds=0.2)
        await some(100)
        assert await settled(lambda: roots() == 1000, 90)
        await asyncio.to_thread(parts.tracing._worker.settle)
        metrics = (await client.get("/metrics")).text
    assert 'loradock_otel_dropped_total{signal="traces"} 0.0' in metrics
    spans = collector.traces()
    assert len(spans) == 1000 and {len(trace) for trace in spans.values()} == {5}


async def test_a_collector_that_holds_every_request_holds_up_no_answer(traced, connect, collector):
    collector.behave(seconds=600)
    async with connect(traced()) as client:
        for _ in range(20):
            assert (await ask(client, "base")).status_code == 200
        assert not collector.spans(), "the answers were there before the collector took a span"
        collector.behave()
        assert await settled(lambda: len(collector.traces()) == 20)


async def test_what_does_not_fit_into_the_queue_is_dropped_and_counted(traced, connect, collector):
    collector.behave(status=503)
    async with connect(traced(OTEL_BSP_MAX_QUEUE_SIZE="20")) as client:
        for _ in range(30):
            assert (await ask(client, "base")).status_code == 200
        parts = client._transport.app.state.parts
        await asyncio.to_thread(parts.tracing._worker.settle)
        metrics = (await client.get("/metrics")).text
        dropped = [line for line in metrics.splitlines() if line.startswith("loradock_otel_dropped_total")]
        values = {line.split()[0]: float(line.split()[1]) for line in dropped}
        assert values['loradock_otel_dropped_total{signal="traces"}'] >= 10
        collector.behave()


async def test_a_stop_sends_what_waits(traced, connect, collector):
    async with connect(traced(OTEL_BSP_SCHEDULE_DELAY="60000")) as client:
        await ask(client, "base")
    assert len(collector.traces()) == 1


async def test_a_collector_is_reached_by_grpc_too(traced, connect, tmp_path):
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    from concurrent.futures import ThreadPoolExecutor

    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    from tests.support.otlp_receiver import spans_of

    received: list[dict[str, Any]] = []

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.extend(spans_of(request))
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        config = traced(
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc"
        )
        async with connect(config) as client:
            await ask(client, "base")
            assert await settled(lambda: any(span["name"] == "chat base" for span in received))
    finally:
        server.stop(None)


async def test_what_the_exporter_does_not_take_refuses_the_start_with_a_sentence(traced, connect):
    config = traced(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc", OTEL_EXPORTER_OTLP_COMPRESSION="zip")
    with pytest.raises(ConfigError, match="the OTEL_ variables cannot be used for traces: .*zip"):
        connect(config)


OFF = """
import asyncio, json, sys
from pathlib import Path
from serve.config import load
from tests.support.app import Started, ask
from tests.support.backend import FakeBackend

async def main():
    config = load([sys.argv[1], "--name", "base", "--data-dir", sys.argv[2]])
    async with Started(config, FakeBackend(sys.argv[1])) as client:
        answer = await ask(client, "base")
        assert answer.status_code == 200 and "traceresponse" not in answer.headers
        assert client._transport.app.state.parts.tracing is None
        assert "loradock_otel" not in (await client.get("/metrics")).text
    print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "opentelemetry")))

asyncio.run(main())
"""


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported(tiny_model: Path, tmp_path: Path):
    clean = {name: value for name, value in environment().items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", OFF, str(tiny_model), str(tmp_path / "data")]
    ran = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == []
