"""Whatever keeps the server from answering is counted for the adapter version that was asked, by reason."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.config import keys_hashed
from serve.engine.engine import Phase
from tests.support.app import CHAT, ask, http, issued, upload
from tests.support.waiting import settled

FAILED, QUEUED = "loradock_requests_failed_total", "loradock_queue_time_seconds"
V1 = {"adapter": "tone", "version": "v1"}


@pytest.fixture(autouse=True)
def every_scrape_is_fresh(monkeypatch):
    monkeypatch.setattr("serve.telemetry.metrics.FRESH", -1.0)


@pytest.fixture
async def one_seat(connect, config, backend, make_adapter):
    """A server with one seat, where nobody may wait; it has answered once."""
    backend.seats = 1
    async with connect(replace(config, max_wait=0.0)) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
        await ask(client, "tone")
        yield client


async def counted(client, name, **labels):
    text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


async def test_a_request_that_an_overloaded_server_refuses_is_the_adapters(one_seat, backend):
    backend.flow.clear()
    answering = asyncio.create_task(ask(one_seat, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    refused = await ask(one_seat, "tone")
    assert refused.status_code == 429
    backend.flow.set()
    await answering
    assert await counted(one_seat, FAILED, **V1, reason="overloaded") == 1
    assert await counted(one_seat, "loradock_requests_total", **V1, code="429") == 1
    assert await counted(one_seat, "loradock_queue_refused_total", adapter="tone", tenant="default") == 1
    assert await counted(one_seat, f"{QUEUED}_count", **V1) == 2, "who is refused at once does not wait"


async def test_a_deadline_that_passes_in_the_queue_is_the_adapters_and_its_wait_is_counted(
    connect, config, backend, make_adapter
):
    backend.seats = 1
    async with connect(config) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
        backend.flow.clear()
        answering = asyncio.create_task(ask(client, "tone", stream=True))
        assert await settled(lambda: backend.running == 1)
        late = await client.post(CHAT, json={"model": "tone"}, headers={"x-request-timeout": "1"})
        assert late.status_code == 504
        assert await counted(client, FAILED, **V1, reason="queue_deadline") == 1
        assert await counted(client, f"{QUEUED}_count", **V1) == 1
        assert await counted(client, f"{QUEUED}_sum", **V1) > 0.1
        backend.flow.set()
        await answering


async def test_who_leaves_the_queue_has_waited_and_is_no_failure(connect, config, backend):
    backend.seats = 1
    async with connect(config) as client:
        backend.flow.clear()
        answering = asyncio.create_task(ask(client, "base", stream=True))
        assert await settled(lambda: backend.running == 1)
        app = client._transport.app
        scope, receive, send, _, left = http({"model": "base"})
        waiting = asyncio.create_task(app(scope, receive, send))
        queue = app.state.parts.fleet.first.engine.queue
        assert await settled(lambda: queue.waiting == 1)
        assert await counted(client, "loradock_queue_waiting", adapter="base", tenant="default") == 1
        left.set()
        await waiting
        assert await counted(client, f"{QUEUED}_count", adapter="base") == 1
        assert await counted(client, "loradock_requests_total", adapter="base", code="499") == 1
        assert await counted(client, FAILED) == 0
        backend.flow.set()
        await answering


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_passes_while_it_is_answered_is_another_reason(client, backend, make_adapter, stream):
    await client.post("/v1/adapters", **upload(make_adapter()))
    backend.flow.clear()
    if not stream:
        backend.slow = (await ask(client, "tone")).json()["model"]
    late = await client.post(CHAT, json={"model": "tone", "stream": stream}, headers={"x-request-timeout": "1"})
    assert late.status_code == (200 if stream else 504)
    assert await counted(client, FAILED, **V1, reason="deadline") == 1
    assert await counted(client, FAILED) == 1


async def test_without_an_engine_the_adapter_is_named_all_the_same(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    client._transport.app.state.parts.fleet.first.phase = Phase.FAILED
    assert (await ask(client, "tone")).status_code == 503
    assert await counted(client, FAILED, **V1, reason="unavailable") == 1
    assert await counted(client, "loradock_requests_total", **V1, code="503") == 1


async def test_a_refused_request_counts_for_the_live_dashboard_too(one_seat, backend):
    backend.flow.clear()
    answering = asyncio.create_task(ask(one_seat, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    await ask(one_seat, "tone")
    backend.flow.set()
    await answering
    (version,) = (await one_seat.get("/v1/adapters/tone")).json()["versions"]
    assert sum(minute["errors"] for minute in version["recent"]) == 1


async def test_a_key_over_its_own_limit_is_no_failure_of_any_adapter(connect, config, make_adapter):
    async with connect(replace(config, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        await operator.post("/v1/adapters", **upload(make_adapter()))
        limited = await issued(operator, "default", "inference", requests_per_minute=1)
        assert [(await ask(limited, "tone")).status_code for _ in range(2)] == [200, 429]
        assert (await ask(operator, "nobody")).status_code == 404
        assert await counted(operator, FAILED) == 0
        assert await counted(operator, "loradock_requests_total", adapter="other", code="429") == 1
        assert await counted(operator, "loradock_requests_total", adapter="other", code="404") == 1


async def test_loading_an_adapter_is_no_time_in_the_queue(client, backend, make_adapter, monkeypatch):
    await client.post("/v1/adapters", **upload(make_adapter(), promote="false"))
    add = backend.add

    async def slowly(*asked):
        await asyncio.sleep(0.5)
        await add(*asked)

    monkeypatch.setattr(backend, "add", slowly)
    parts = client._transport.app.state.parts
    await parts.fleet.first.engine.gone(parts.registry.get("tone", 1).id)
    assert (await ask(client, "tone@v1")).status_code == 200
    queued = await counted(client, f"{QUEUED}_sum", **V1)
    first_token = await counted(client, "loradock_time_to_first_token_seconds_sum", **V1)
    assert first_token - queued > 0.49, (first_token, queued)


@pytest.mark.parametrize("begun", [False, True])
async def test_what_raises_behind_the_route_is_a_failure_of_its_version(client, backend, make_adapter, begun):
    """The client gets a 500, or the end of an answer that had begun: no figure may say that nothing failed."""
    await client.post("/v1/adapters", **upload(make_adapter()))

    async def raising(scope, receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("a defect")

    backend.app = raising
    with pytest.raises(RuntimeError, match="a defect"):
        await ask(client, "tone")
    assert await counted(client, FAILED, **V1, reason="error") == 1
    assert await counted(client, FAILED) == 1
    assert await counted(client, "loradock_requests_total", **V1, code="200" if begun else "500") == 1
    (card,) = (await client.get("/v1/overview")).json()["first"]
    assert (card["requests"], card["errors"]) == (1, 1)
    assert [problem["kind"] for problem in card["problems"]] == ["errors"]
