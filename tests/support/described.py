"""A server over the fake backend with an admin key and an adapter, for whoever tries its OpenAPI document.

python -m tests.support.described PORT
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import httpx

from serve.config import keys_hashed, load
from serve.server.assembly import build_app
from tests.support import tiny
from tests.support.app import upload
from tests.support.backend import FakeBackend
from tests.support.listening import uvicorn_server

KEY = "an-admin-key-of-the-tests"


async def main(port: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model = tiny.model(folder / "model")
        config = load([str(model), "--name", "base", "--data-dir", str(folder / "data"), "--port", str(port)], {})
        app = build_app(replace(config, admin_keys=keys_hashed([KEY])), FakeBackend(str(model)))  # type: ignore[arg-type]
        server = uvicorn_server(app, port=port)
        serving = asyncio.create_task(server.serve())
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client:
            while not (server.started and app.state.parts.health.ready.is_set()):
                await asyncio.sleep(0.1)
            for seed in (0, 1):
                adapter = tiny.adapter(folder / f"adapter-{seed}", seed)
                (await client.post("/v1/adapters", **upload(adapter))).raise_for_status()
            (await client.get("/openapi.json")).raise_for_status()
        print("ready", flush=True)
        await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
