"""A candidate answers beside the live version, and no client ever notices."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve.server.assembly import build_app
from tests.support.app import push_two, said
from tests.support.waiting import settled


@pytest.fixture
async def pairs():
    return []


@pytest.fixture
async def client(connect, config, backend, pairs):
    started = connect(config, backend)
    started.app = build_app(config, backend, on_shadow=pairs.append)
    async with started as client:
        yield client


async def shadow(client, weight, version=2):
    return await client.post("/v1/adapters/tone/shadow", json={"version": version, "weight": weight})


async def counted(client, result):
    lines = (await client.get("/metrics")).text.splitlines()
    return [float(line.split()[-1]) for line in lines if "shadow_requests" in line and f'result="{result}"' in line]


async def test_the_candidate_answers_too_and_the_client_sees_the_live_version(client, backend, pairs, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    assert (await shadow(client, 1)).json()["shadow"] == {"version": 2, "weight": 1.0}
    assert await said(client, messages=[{"role": "user", "content": "hello"}]) == live
    assert await settled(lambda: pairs)
    (pair,) = pairs
    assert (pair.name, pair.live_version, pair.candidate_version, pair.status) == ("tone", 1, 2, 200)
    assert (json.loads(pair.live)["model"], json.loads(pair.candidate)["model"]) == (live, candidate)
    assert backend.bodies[-1]["priority"] > 0 and backend.bodies[-1]["messages"] == pair.request["messages"]
    assert await counted(client, "answered") == [1.0]


async def test_the_share_is_exact(client, pairs, make_adapter):
    await push_two(client, make_adapter)
    await shadow(client, 0.25)
    shadows = client._transport.app.state.parts._shadows
    for _ in range(40):
        await said(client, user="the same one")
        assert await settled(lambda: not shadows._running), "more than a few at once are dropped"
    assert 9 <= len(pairs) <= 11


async def test_a_stream_is_compared_in_one_piece(client, backend, pairs, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await shadow(client, 1)
    streamed = await client.post("/v1/chat/completions", json={"model": "tone", "stream": True, "messages": []})
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert await settled(lambda: pairs)
    assert pairs[0].live.decode() == streamed.text and live in streamed.text
    assert json.loads(pairs[0].candidate) == {"model": candidate}


async def test_an_answer_that_is_compared_passes_piece_by_piece(client, monkeypatch, make_adapter):
    """Others may be written past whoever looks at them."""
    calls = []
    fast_stream = SimpleNamespace(of=lambda scope, fields, send, call: calls.append(call))
    monkeypatch.setattr("serve.gateway.inference.FastStream", fast_stream)
    await push_two(client, make_adapter)
    await said(client)
    await shadow(client, 1)
    await said(client)
    assert calls[0] is not None and calls[1] is None


async def test_a_shadow_that_fails_is_counted_and_hurts_nobody(client, backend, pairs, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await shadow(client, 1)
    backend.broken = candidate
    assert await said(client) == live
    assert await settled(lambda: counted(client, "failed"))
    assert await counted(client, "failed") == [1.0]
    assert pairs == []
    backend.broken = None
    assert await said(client) == live
    assert await settled(lambda: pairs)


async def test_while_all_are_busy_more_are_dropped_and_counted_and_no_answer_waits(client, backend, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await shadow(client, 1)
    backend.slow = candidate
    answers = [await asyncio.wait_for(said(client), 60) for _ in range(5)]
    assert answers == [live] * 5
    assert await counted(client, "dropped") == [3.0]


async def test_an_error_a_pinned_version_and_a_stored_answer_have_no_shadow(client, backend, pairs, make_adapter):
    await push_two(client, make_adapter)
    await shadow(client, 1)
    await client.post("/v1/chat/completions", json={"model": "tone", "stream": True, "fail": True})
    await said(client, "tone@v1")
    await said(client, path="/v1/responses", background=True)
    await said(client, path="/v1/embeddings")
    await asyncio.sleep(0.1)
    assert pairs == []


async def test_a_stop_does_not_wait_for_a_shadow(connect, config, backend, make_adapter):
    async with connect(config) as client:
        _, candidate = await push_two(client, make_adapter)
        await shadow(client, 1)
        backend.slow = candidate
        await said(client)
        assert await settled(lambda: backend.bodies[-1]["model"] == candidate)


async def test_without_room_for_any_all_are_dropped(connect, config, make_adapter):
    async with connect(replace(config, max_shadows=0)) as client:
        await push_two(client, make_adapter)
        await shadow(client, 1)
        await said(client)
        assert await counted(client, "dropped") == [1.0]


@pytest.mark.parametrize("priority", [-1, 1 << 40])
async def test_nobody_jumps_the_queue_nor_stands_behind_the_shadows(client, priority):
    response = await client.post("/v1/chat/completions", json={"model": "base", "priority": priority})
    assert response.status_code == 400 and response.json()["error"]["param"] == "priority"
