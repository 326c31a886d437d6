"""The server as `loradock serve` runs it, in the process that measures it: its loop, its connections, its garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvloop

from serve.config import Config
from serve.server.connection import guarded
from serve.server.garbage import collect_in_quiet
from tests.support.listening import uvicorn_server

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on the loop that the server has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@asynccontextmanager
async def in_process(config: Config, port: int) -> AsyncIterator[Any]:
    """The parts of a server that is ready, on a port of this machine. config: resolved."""
    from serve.server.assembly import build_app
    from serve.vllm_backend.backend import VLLMBackend

    app = build_app(
        config, [VLLMBackend(base.model, base.name, base.engine, config.coalesce_ms) for base in config.bases]
    )
    http = guarded(config.client_timeout)
    server = uvicorn_server(app, port=port, access_log=False, http=http)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.1)
    parts = app.state.parts
    await parts.health.ready.wait()
    collecting = asyncio.create_task(collect_in_quiet(lambda: len(server.server_state.connections)))
    try:
        yield parts
    finally:
        collecting.cancel()
        server.should_exit = True
        await serving
