"""An app on a socket of its own, by uvicorn: on the event loop of the test, or in a thread beside it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from serve.server.connection import KEEP_ALIVE
from tests.support.waiting import eventually, settled


def uvicorn_server(app: Any, **options: Any) -> uvicorn.Server:
    """Every server of the tests: it closes no idle connection while a client sends on it, as `loradock serve` does."""
    return uvicorn.Server(uvicorn.Config(app, **{"log_level": "warning", "timeout_keep_alive": KEEP_ALIVE} | options))


@asynccontextmanager
async def listening(app: Any, *, force_exit: bool = False, **options: Any) -> AsyncIterator[str]:
    """Its address, once it takes connections. force_exit: its end waits for no connection, and for no lifespan's."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn_server(app, **{"log_level": "error", **options})
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        assert await settled(lambda: server.started or serving.done())
        try:
            yield "http://{}:{}".format(*sock.getsockname())
        finally:
            server.should_exit, server.force_exit = True, force_exit
            await serving


@contextmanager
def listening_beside(app: Any, **options: Any) -> Iterator[str]:
    """Its address; its event loop is a thread's."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn_server(app, **{"log_level": "error", **options})
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        assert eventually(lambda: server.started or not thread.is_alive())
        try:
            yield "http://{}:{}".format(*sock.getsockname())
        finally:
            server.should_exit = True
            thread.join()
