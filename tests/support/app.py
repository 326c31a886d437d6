"""The app in this process, and what tests ask of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from serve.config import Config
from serve.server.assembly import build_app
from tests.support.backend import FakeBackend
from tests.support.waiting import settled

CHAT = "/v1/chat/completions"


class Started:
    """`async with Started(config, backend) as client`: the app over a backend, started; the client of it."""

    def __init__(self, config: Config, backend: FakeBackend) -> None:
        if backend.model == FakeBackend.model:
            backend.model = config.model
        self.app = build_app(config, backend)  # type: ignore[arg-type]

    async def __aenter__(self) -> httpx.AsyncClient:
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        try:
            await ready(self.app)
        except BaseException:
            await self._lifespan.__aexit__(None, None, None)
            raise
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        await self._lifespan.__aexit__(None, None, None)


async def ready(app: Any) -> None:
    """Its engines serve."""
    assert await settled(app.state.parts.health.ready.is_set), list(map(str, asyncio.all_tasks()))


def upload(folder: Path, name: str = "tone", **fields: str) -> dict[str, Any]:
    """httpx arguments of a push."""
    files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
    return {"data": {"name": name, **fields}, "files": files}


async def issued(operator, tenant: str, *scopes: str, name: str = "key", **limits: int) -> httpx.AsyncClient:
    """A client of that tenant, with a key that was just issued."""
    body = {"tenant": tenant, "name": name, "scopes": scopes or ["inference", "adapters:write"], "limits": limits}
    created = await operator.post("/v1/keys", json=body)
    assert created.status_code == 201, created.text
    headers = {"authorization": f"Bearer {created.json()['secret']}"}
    return httpx.AsyncClient(transport=operator._transport, base_url="http://localhost", headers=headers)


async def ask(client, model, **more):
    return await client.post("/v1/chat/completions", json={"model": model, "messages": [], **more})


async def push_two(client, make_adapter):
    """Version 1 is live, version 2 waits."""
    ids = []
    for seed in (0, 1):
        pushed = await client.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
        ids.append(pushed.json()["id"])
    return ids


async def canary(client, weight, version=2):
    return await client.post("/v1/adapters/tone/canary", json={"version": version, "weight": weight})


async def said(client, model="tone", path=CHAT, **fields):
    return (await client.post(path, json={"model": model, **fields})).json()["model"]


def http(body, path=CHAT, method="POST"):
    """An ASGI request of our own making, with a client that can leave."""
    sent, left = [], asyncio.Event()
    chunks = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if chunks:
            return chunks.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http"}
    return scope, receive, send, sent, left
