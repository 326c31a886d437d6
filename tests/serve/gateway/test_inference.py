from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.app import CHAT, http, upload
from tests.support.waiting import settled


async def test_a_client_that_leaves_mid_stream_gives_its_lease_back(client, backend):
    app = client._transport.app
    backend.flow.clear()
    scope, receive, send, sent, left = http({"model": "base", "stream": True})
    answering = asyncio.create_task(app(scope, receive, send))
    assert await settled(lambda: len(sent) >= 2)
    assert app.state.parts.fleet.first.leases == 1
    left.set()
    await answering
    assert (app.state.parts.fleet.first.leases, backend.running) == (0, 0)


async def test_a_client_that_leaves_before_the_first_chunk_gives_its_lease_back(client, backend, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    app = client._transport.app
    scope, receive, send, _, _ = http({"model": "tone", "stream": True})
    answering = asyncio.create_task(app(scope, receive, send))
    await asyncio.sleep(0)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert app.state.parts.fleet.first.leases == 0


async def test_an_error_before_the_first_token_is_an_http_error_and_no_stream(client):
    response = await client.post(CHAT, json={"model": "base", "stream": True, "fail": True})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"] == "too long"


async def test_an_unknown_model_is_a_404_also_when_it_was_to_stream(client):
    for stream in (False, True):
        response = await client.post(CHAT, json={"model": "nobody", "stream": stream})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
        ('00-"} 1-x', None),
    ],
)
async def test_the_clients_trace_stands_beside_the_latency_of_its_request(client, header, trace):
    headers = {"traceparent": header, "x-request-id": "r-1"}
    assert (await client.post(CHAT, json={"model": "base"}, headers=headers)).status_code == 200
    text = (await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})).text
    expected = 'request_id="r-1"' + (f',trace_id="{trace}"' if trace else "")
    assert f"# {{{expected}}} " in text


async def test_a_request_has_an_id_of_the_servers_and_the_clients_own_is_echoed(issue, backend):
    shop, stranger = await issue("acme", name="shop"), await issue("acme", name="stranger")
    body, named = {"model": "base"}, {"x-request-id": "order-7"}
    answers = [await key.post(CHAT, json=body, headers=named) for key in (shop, stranger)]
    assert [answer.headers.get_list("x-request-id") for answer in answers] == [["order-7"], ["order-7"]]
    first, second = (headers["x-request-id"] for headers in backend.headers[-2:])
    assert len({first, second, "order-7"}) == 3, "the engine knows them apart"
    unnamed = await shop.post(CHAT, json=body)
    assert unnamed.headers["x-request-id"] == backend.headers[-1]["x-request-id"]
    rated = {"request_id": "order-7", "rating": 1}
    assert [(await key.post("/v1/feedback", json=rated)).status_code for key in (shop, shop, stranger)] == [
        200,
        404,
        200,
    ]
    by_answer = {"request_id": f"chatcmpl-{backend.headers[-1]['x-request-id']}", "rating": 1}
    assert (await stranger.post("/v1/feedback", json=by_answer)).status_code == 200


async def test_without_a_model_the_base_answers(client):
    assert (await client.post(CHAT, json={"messages": []})).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b'{"model": 3}', b"\xff\xfe{\x00}\x00", b"[" * 20_000]
)
async def test_a_body_that_is_no_request_is_a_sentence(client, body):
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_a_model_that_is_spelled_in_another_encoding_cannot_slip_past_the_lease(client, make_adapter):
    pushed = (await client.post("/v1/adapters", **upload(make_adapter()))).json()
    body = json.dumps({"model": pushed["id"]}).encode("utf-16")
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("path", "status"),
    [
        # These two are answered here, over versions (tests/serve/api/test_runtime_lora.py).
        ("/v1/load_lora_adapter", 403),
        ("/v1/unload_lora_adapter", 404),
        ("/reset_prefix_cache", 404),
        ("/collective_rpc", 404),
        ("/sleep", 404),
    ],
)
async def test_the_engines_own_controls_are_out_of_reach(client, backend, path, status):
    assert (await client.post(path, json={"lora_name": "x", "lora_path": "/etc"})).status_code == status
    assert backend.bodies == []


async def test_the_rest_of_a_request_reaches_the_engine_as_it_came(client, backend, make_adapter):
    pushed = (await client.post("/v1/adapters", **upload(make_adapter()))).json()
    body = {"model": "tone", "messages": [{"role": "user", "content": 'ä\u2028"€'}], "seed": 2**53, "temperature": 0.1}
    await client.post(CHAT, json=body)
    assert backend.bodies[-1] == {**body, "model": pushed["id"]}
