"""Forks servers over the fake backend, so that one can be killed and the next is there in a tenth of a second.

    python -m tests.support.zygote DATA_DIR MODEL_DIR PORT [OPTION...]

A line on standard input starts a server; its process id comes back as a line, and then its end as another. Its policies
are in POLICIES, and what its engine says to everything is in ANSWER.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx

from serve.config import load
from serve.models.lora_modules import lora_modules
from serve.server.assembly import build_app
from tests.support.backend import FakeBackend
from tests.support.listening import uvicorn_server
from tests.support.server import ROOT, free_port
from tests.support.trainer import COMMAND
from tests.support.waiting import eventually


class Zygote:
    """The program, and a client of the server that it forked last."""

    def __init__(self, data: Path, model: Path, *options: str, **environ: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "tests.support.zygote", str(data), str(model), str(port), *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self._server = 0

    def start(self) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("start\n")
        self.process.stdin.flush()
        server = self._server = int(self.process.stdout.readline())
        assert eventually(self._is_ready), "the server did not come back"
        return server

    def kill(self, server: int) -> None:
        assert self.process.stdout
        os.kill(server, signal.SIGKILL)
        self._server = 0
        assert self.process.stdout.readline() == "ended\n"

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        assert self.process.stdin
        self.client.close()
        if self._server:  # a test that failed leaves it
            os.kill(self._server, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(30)


def main(data: Path, model: str, port: str, *options: str) -> None:
    lora_modules(model)  # the imports that take seconds happen here, once
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            policies = os.environ.get("POLICIES", "{}")
            words = [model, "--name", "base", "--data-dir", str(data), "--port", port, "--policies", policies, *options]
            config, backend = load(words, {}), FakeBackend(model)
            if answer := os.environ.get("ANSWER"):
                backend.generation, backend.say = replace(backend.generation, text=answer), lambda body: answer
            app = build_app(config, backend)  # type: ignore[arg-type]
            process = app.state.parts.fine_tuning.runner.process
            process.command, process.nice = COMMAND, 0
            uvicorn_server(app, port=config.port, log_level="error").run()
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
