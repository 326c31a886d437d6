"""Who would wait too long is told so at once, and when to come again; a deadline ends the work."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest

from serve.engine.admission import Admission
from serve.engine.fair_queue import FairQueue
from serve.errors import Overloaded
from tests.support.app import CHAT, ask, http
from tests.support.waiting import settled
from tests.support.watched_traffic import Engine, push


@pytest.fixture
async def queue():
    return FairQueue(4, 4)


def test_a_free_seat_means_no_wait(queue):
    admission = Admission(queue, 1.0)
    admission.left(100.0)
    assert admission.check("a", 0) == 0.0


def test_the_forecast_is_what_is_ahead_times_how_long_seats_are_held(queue):
    admission = Admission(queue, 10.0)
    admission.left(2.0)
    for _ in range(3 + 7):
        queue.enter("a")
    assert admission.forecast("a", 0) == pytest.approx((7 + 1) * 2.0 / 4)
    assert admission.forecast("a", 1) == admission.forecast("a", 0), "what is more urgent goes first"
    assert admission.forecast("b", 0) == 0.0, "one seat is kept for tenants that have none"
    queue.enter("b")
    assert admission.forecast("b", 0) == pytest.approx(2.0 / 2), "two tenants have half of the seats each"


def test_who_would_wait_too_long_is_told_when_to_come_again(queue):
    admission = Admission(queue, 10.0)
    admission.left(2.0)
    for _ in range(3 + 40):
        queue.enter("a")
    with pytest.raises(Overloaded) as refused:
        admission.check("a", 0)
    assert refused.value.retry_after == 11  # 41 * 2 / 4 = 20.5 less 10
    assert admission.check("b", 0) < 10


def test_what_forecasts_were_off_by_is_learned_though_it_comes_out_late(queue):
    admission = Admission(queue, 9.0)
    admission.left(2.0)
    for _ in range(3 + 7):
        queue.enter("a")
    asked = [admission.forecast("a", 0) for _ in range(100)]
    assert asked[0] == 4.0
    for forecast in asked:  # all of them were made before the first came true
        admission.seated(forecast, 6.0)
    assert admission.check("a", 0) == 4.0, "the wait would be 6 s"
    for _ in range(6):
        queue.enter("a")
    with pytest.raises(Overloaded, match="about 10 s"):
        admission.check("a", 0)


@pytest.fixture
async def crowded(connect, config, backend):
    """A client of a server with one seat, which lets nobody in for more than a second."""
    backend.seats = 1
    async with connect(replace(config, max_wait=1.0, client_timeout=0.5)) as client:
        yield client


async def test_a_crowd_is_turned_away_at_once_and_let_in_when_it_is_over(crowded, backend):
    backend.flow.clear()
    answering = asyncio.create_task(ask(crowded, "base", stream=True))
    assert await settled(lambda: backend.running == 1)
    await asyncio.sleep(1.2)
    backend.flow.set()
    await answering
    backend.flow.clear()
    holding = asyncio.create_task(ask(crowded, "base", stream=True))
    assert await settled(lambda: backend.running == 1)
    told = await asyncio.wait_for(ask(crowded, "base"), 60)
    assert not holding.done(), "it waited"
    assert (told.status_code, told.json()["error"]["code"]) == (429, "overloaded")
    assert int(told.headers["retry-after"]) >= 1
    backend.flow.set()
    assert (await holding).status_code == 200
    assert (await ask(crowded, "base")).status_code == 200


async def test_a_deadline_ends_the_work_in_the_engine(crowded, backend):
    backend.flow.clear()
    scope, receive, send, sent, _ = http({"model": "base", "stream": True})
    scope["headers"].append((b"x-request-timeout", b"1"))
    began = time.perf_counter()
    await crowded._transport.app(scope, receive, send)
    assert time.perf_counter() - began > 0.9
    error = json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]
    assert error["code"] == 504
    assert backend.running == 0
    assert crowded._transport.app.state.parts.fleet.first.leases == 0


async def test_a_deadline_that_passes_in_line_is_a_504(crowded, backend):
    backend.flow.clear()
    holding = asyncio.create_task(ask(crowded, "base", stream=True))
    assert await settled(lambda: backend.running == 1)
    told = await crowded.post(CHAT, json={"model": "base"}, headers={"x-request-timeout": "1"})
    assert (told.status_code, told.json()["error"]["code"]) == (504, "deadline_exceeded")
    backend.flow.set()
    assert (await holding).status_code == 200
    assert crowded._transport.app.state.parts.fleet.first.leases == 0


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e9"])
async def test_a_deadline_that_is_none_is_a_sentence(crowded, given):
    told = await crowded.post(CHAT, json={"model": "base"}, headers={"x-request-timeout": given})
    assert told.status_code == 400 and "X-Request-Timeout" in told.json()["error"]["message"]


async def test_a_client_that_reads_nothing_gives_its_turn_back(crowded, backend):
    scope, receive, _, sent, _ = http({"model": "base", "stream": True})

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await asyncio.wait_for(crowded._transport.app(scope, receive, send), 60)
    assert (crowded._transport.app.state.parts.fleet.first.leases, backend.running) == (0, 0)


async def test_a_client_that_never_ends_its_request_is_let_go(crowded):
    scope, _, send, sent, _ = http({})

    async def receive():
        return await asyncio.Event().wait()

    await asyncio.wait_for(crowded._transport.app(scope, receive, send), 60)
    assert sent[0]["status"] == 408


async def test_a_client_that_leaves_its_place_in_line_leaves_it_at_once(crowded, backend):
    backend.flow.clear()
    holding = asyncio.create_task(ask(crowded, "base", stream=True))
    assert await settled(lambda: backend.running == 1)
    engine = crowded._transport.app.state.parts.fleet.first
    scope, receive, send, _, left = http({"model": "base", "stream": True})
    waiting = asyncio.create_task(crowded._transport.app(scope, receive, send))
    assert await settled(lambda: engine.engine.queue.waiting == 1)
    left.set()
    await asyncio.wait_for(waiting, 60)
    assert (engine.engine.queue.waiting, engine.leases) == (0, 1)
    backend.flow.set()
    assert (await holding).status_code == 200
    assert engine.leases == 0


async def test_probes_and_baseline_builds_teach_the_clients_forecast_nothing(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        parts = client._transport.app.state.parts
        await push(client, make_adapter, 0)
        await parts.prober.round()
        built = await client.post("/v1/adapters/tone/baseline", json={"prompts": ["a prompt"] * 20})
        assert built.status_code == 200
        engine = parts.fleet.first.engine
        for _ in range(engine.queue.seats + 10):
            engine.queue.enter("a")
        assert engine._admission.forecast("a", 0) == 0.0, "no client has held a seat yet"
