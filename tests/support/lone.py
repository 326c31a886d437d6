"""`python -m tests.support.lone MODEL DATA PORT [FLAG ...]`: the server in a process of its own, without an engine."""

from __future__ import annotations

import os
import sys

from serve.config import load
from serve.server.assembly import build_app
from serve.server.connection import guarded
from tests.support.backend import FakeBackend
from tests.support.listening import uvicorn_server

CLIENT_TIMEOUT = 2.0


def main(model: str, data: str, port: str, *flags: str) -> None:
    timeout = str(CLIENT_TIMEOUT)
    words = ["--name", "base", "--data-dir", data, "--port", port, "--client-timeout", timeout, *flags]
    config = load([model, *words], os.environ if flags else {})
    backend = FakeBackend(model)
    app = build_app(config, backend)  # type: ignore[arg-type]
    uvicorn_server(app, port=config.port, log_level="error", http=guarded(CLIENT_TIMEOUT)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
