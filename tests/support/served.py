"""The whole app on a port, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx

from serve.config import Config
from serve.server.assembly import build_app
from tests.support.backend import FakeBackend
from tests.support.listening import uvicorn_server
from tests.support.waiting import eventually


class Served:
    """`with Served(config, backend, key) as served`: a server that is ready; `http` is a client of it with the key."""

    def __init__(self, config: Config, backend: FakeBackend, key: str) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = build_app(config, backend)
        self._server = uvicorn_server(self.app)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([sock])))
        self.http = self.client(key)

    def client(self, key: str) -> httpx.Client:
        """A client with another key."""
        limits = httpx.Limits(max_connections=200)
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, limits=limits)

    def issue(self, tenant: str, *scopes: str, **limits: int) -> httpx.Client:
        """A client of that tenant, with a key that was just issued."""
        body = {"tenant": tenant, "name": f"key-of-{tenant}", "scopes": scopes, "limits": limits}
        created = self.http.post("/v1/keys", json=body)
        assert created.status_code == 201, created.text
        return self.client(created.json()["secret"])

    def __enter__(self) -> Served:
        self._thread.start()
        assert eventually(self._is_ready), "the server is not ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False
