"""SageMaker's container: /ping, and /invocations, where the body says which route answers."""

from __future__ import annotations

import pytest

from serve.gateway.request import INVOKED
from tests.support.app import upload

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (CHAT, "/v1/chat/completions"),
        ({"prompt": "hi"}, "/v1/completions"),
        ({"query": "hi", "documents": ["a", "b"]}, "/rerank"),
        ({"input": "hi"}, "/v1/embeddings"),
    ],
)
async def test_an_invocation_is_the_request_that_its_body_is(client, backend, body, path):
    plain = await client.post(path, json={"model": "base", **body})
    invoked = await client.post("/invocations", json={"model": "base", **body})
    assert (invoked.status_code, invoked.json()) == (plain.status_code, plain.json())
    assert backend.paths[-2:] == [path, path]


async def test_sagemakers_header_names_the_adapter(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "tone"}
    for body in (CHAT, {**CHAT, "model": "base"}):
        answer = await client.post("/invocations", json=body, headers=header)
        assert answer.headers["x-loradock-version"] == "tone@v1"
    assert (await client.post("/invocations", json=CHAT, headers={next(iter(header)): "nobody"})).status_code == 404
    assert "x-loradock-version" not in (await client.post("/invocations", json=CHAT)).headers


async def test_a_body_that_means_no_route_is_a_sentence(client):
    refused = await client.post("/invocations", json={"model": "base"})
    assert refused.status_code == 400
    assert all(field in refused.json()["error"]["message"] for field in INVOKED)
    assert (await client.get("/invocations")).status_code == 405


async def test_an_invocation_needs_a_key_as_any_request(operator, issue):
    assert (await operator.post("/invocations", json=CHAT, headers={"authorization": ""})).status_code == 401
    asker = await issue("acme", "inference")
    assert (await asker.post("/invocations", json=CHAT)).status_code == 200


async def test_a_ping_is_answered_once_every_engine_serves(client, backend):
    assert (await client.get("/ping")).status_code == 200
    backend.wont_start, backend.dead = "no", True
    from tests.support.waiting import settled

    fleet = client._transport.app.state.parts.fleet
    backend.another = lambda model=None: backend
    assert await settled(lambda: not fleet.first.is_ready)
    assert (await client.get("/ping")).status_code == 503
