"""Ray's proxy learns from a header which adapter a request is for, and passes on everything as it came."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve.gateway.request import TEXT_BYTES
from serve.server import ray_proxy
from serve.server.ray_proxy import HEADER, ModelHeader, middleware, model_of

CHAT = "/v1/chat/completions"


@pytest.fixture
async def client():
    """A client of an app behind the proxy's middleware, which answers what it got."""

    async def echo(request: Request) -> JSONResponse:
        body = await request.body()
        named = request.headers.getlist(HEADER.decode()) + request.headers.getlist("serve-multiplexed-model-id")
        return JSONResponse({"named": named, "size": len(body), "end": body[-40:].decode("latin-1")})

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])], middleware=middleware())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        yield client


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("tone", "tone"),
        ("tone@v2", "tone"),
        ("acme/tone@stable", "acme/tone"),
        ("default/tone", "tone"),
        ("tone:0.7+legal:0.3", ""),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("auto", ""),
        ("auto:sql-*", ""),
        ("ä", ""),
        ("x" * 500, ""),
        ("tone\nother", ""),
    ],
)
def test_a_model_names_its_adapter(model, named):
    assert model_of(json.dumps({"model": model}).encode()) == named


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"model": 3}', b"\xff", b'{"messages": []}', b'{"model": "a'])
def test_a_body_that_names_none_is_no_error_of_the_proxy(body):
    assert model_of(body) == ""


async def test_the_body_goes_on_as_it_came_with_the_name_beside_it(client):
    async def pieces():
        for piece in (b'{"model": "to', b'ne@v1", ', b'"messages": []}'):
            yield piece

    answer = (await client.post(CHAT, content=pieces())).json()
    whole = b'{"model": "tone@v1", "messages": []}'
    assert answer == {"named": ["tone"], "size": len(whole), "end": whole.decode()}


async def test_a_client_names_no_adapter_by_the_header(client):
    for name in (HEADER.decode(), "Serve-Multiplexed-Model-Id"):
        for body, named in (({"model": "tone"}, ["tone"]), ({}, [])):
            answer = await client.post(CHAT, json=body, headers={name: "other"})
            assert answer.json()["named"] == named
        assert (await client.get("/v1/models", headers={name: "other"})).json()["named"] == []


async def test_other_routes_are_not_read(client):
    answer = (await client.post("/v1/adapters", json={"model": "tone"})).json()
    assert answer["named"] == [] and answer["size"]


async def test_a_long_body_goes_on_unread(client):
    body = json.dumps({"model": "tone", "user": "x" * TEXT_BYTES}).encode()

    async def pieces():
        for at in range(0, len(body), 1 << 20):
            yield body[at : at + (1 << 20)]

    assert (await client.post(CHAT, content=pieces())).json() == {
        "named": [],
        "size": len(body),
        "end": body[-40:].decode(),
    }


async def test_a_slow_body_is_not_waited_for_and_arrives_whole(monkeypatch):
    monkeypatch.setattr(ray_proxy, "WAIT_SECONDS", 0.01)
    begun, late = asyncio.Event(), asyncio.Event()
    got = []
    messages = iter([b'{"model": ', b'"tone"}'])

    async def receive():
        piece = next(messages, None)
        if piece is None:
            return {"type": "http.disconnect"}
        if piece.endswith(b"}"):
            await late.wait()
        return {"type": "http.request", "body": piece, "more_body": not piece.endswith(b"}")}

    async def app(scope, receive, send):
        begun.set()
        got.append(dict(scope["headers"]))
        while (message := await receive())["type"] != "http.disconnect":
            got.append(message["body"])

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    call = asyncio.create_task(ModelHeader(app)(scope, receive, None))
    await asyncio.wait_for(begun.wait(), 60)
    late.set()
    await asyncio.wait_for(call, 60)
    assert got == [{}, b'{"model": ', b'"tone"}']


async def test_a_client_that_leaves_before_its_body_is_whole_is_told_of():
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    seen = []

    async def receive():
        return messages.pop(0)

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])

    expected = list(messages)
    await ModelHeader(app)({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, None)
    assert seen == expected
