"""A server over FakeBackend in a process of its own, which counts its queries, its CPU time, and waits of its loop.

    python -m tests.support.counted_server MODEL [FLAG ...]

`GET /counted` says what it counted since it was asked last. `Counted` starts one and asks it; with a `model` it starts
the real server, which counts nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import ROOT, descendants, environment, free_port

HEADERS = {"authorization": "Bearer run"}
READY_SECONDS = 300
# Between two looks at how late the loop is.
LOOK_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Counts:
    """What a server did in `seconds`: its CPU time, its statements, and how late its loop was in milliseconds."""

    seconds: float
    cpu: float
    queries: int
    late_p50: float
    late_p99: float
    late_max: float


class Reached:
    """A server that clients reach at a port of its own, and one of its processes, from which the others came."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers=HEADERS, timeout=30)
        self.pid = pid

    def promote(self, name: str, version: int) -> None:
        """Until the server has acknowledged it."""
        self.http.post(f"/v1/adapters/{name}/promote", json={"version": version}).raise_for_status()

    def kill(self) -> None:
        _send(self._family(), signal.SIGKILL)
        self.http.close()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It stands still meanwhile, its engine too."""
        family = self._family()
        _send(family, signal.SIGSTOP)
        try:
            yield
        finally:
            _send(family, signal.SIGCONT)

    def _family(self) -> list[int]:
        return [self.pid, *descendants(self.pid)]


class Counted(Reached):
    """A server on a port of its own; `stop` or `kill` ends it."""

    def __init__(
        self, work: Path, name: str, registry: str, blobs: str, *flags: str, port: int = 0, model: str = "",
        fake: str = "tests.support.counted_server", **environ: str,
    ) -> None:  # fmt: skip
        port = port or free_port()
        self._log = work / f"{name}.log"
        common = ["--port", str(port), "--data-dir", str(work / name), "--registry", registry, "--blobs", blobs]
        program = ["serve.cli", "serve", model] if model else [fake, str(work / "model")]
        url = f"http://127.0.0.1:{port}"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *program, *common, *(flag.format(url=url) for flag in flags)],
                env=environment(LORADOCK_ADMIN_KEYS="run", **environ), cwd=ROOT, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        super().__init__(name, port, self.process.pid)

    def wait_until_ready(self) -> None:
        """SystemExit, if it ends or is not ready in time."""
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} does not start: {self._log.read_text()[-3000:]}")
            with suppress(httpx.HTTPError):
                if self.http.get("/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise SystemExit(f"{self.name} is not ready within {READY_SECONDS} s: {self._log.read_text()[-3000:]}")

    def counts(self) -> Counts:
        """Since the last call."""
        return Counts(**self.http.get("/counted").raise_for_status().json())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self.process.poll() is None:
            family = self._family()
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(45)
            _send(family, signal.SIGKILL)  # an engine that outlived its server too
            self.process.wait()
        self.http.close()


class _Counting:
    """The application, and what it costs."""

    def __init__(self, app: Any) -> None:
        from sqlalchemy import Engine, event

        self._app = app
        self._queries = 0
        self._late: list[float] = []
        self._since = (time.monotonic(), time.process_time())
        self._watching: asyncio.Task[None] | None = None
        event.listen(Engine, "before_cursor_execute", self._note)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        if scope["type"] == "http" and scope["path"] == "/counted":
            await JSONResponse(self._read())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _note(self, *_: object) -> None:
        self._queries += 1

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            self._late.append(time.monotonic() - before - LOOK_SECONDS)

    def _read(self) -> dict[str, float]:
        wall, cpu = time.monotonic(), time.process_time()
        late = sorted(self._late) or [0.0]
        counts = {
            "seconds": wall - self._since[0],
            "cpu": cpu - self._since[1],
            "queries": self._queries,
            "late_p50": 1000 * late[len(late) // 2],
            "late_p99": 1000 * late[len(late) * 99 // 100],
            "late_max": 1000 * late[-1],
        }
        self._since, self._queries, self._late = (wall, cpu), 0, []
        return counts


def _send(family: list[int], number: int) -> None:
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def stand_in(parts: Any) -> None:
    """Loops meet examples that are made up, a trainer that trains nothing, and scores by which the second wins."""
    from tests.serve.loop.conftest import Scores, Traffic
    from tests.support.trainer import COMMAND

    parts.fine_tuning.runner.process.command = COMMAND
    parts.loops.driver.gatekeeper.scorer = scores = Scores()
    scores.hold.set()
    parts.loops.candidates.gather = Traffic()


def main() -> None:
    from serve.config import keys_hashed, load
    from serve.server.assembly import build_app
    from tests.support.backend import FakeBackend
    from tests.support.listening import uvicorn_server

    model, *flags = sys.argv[1:]
    config = replace(load([model, "--name", "base", *flags], {}), admin_keys=keys_hashed(["run"]))
    backend = FakeBackend(model)
    if any(policy.train_on_traffic for policy in config.policies):  # there is something to keep of an answer
        backend.generation = replace(backend.generation, text="Hello to you.")
    built = build_app(config, backend)  # type: ignore[arg-type]
    if any(policy.loop.on for policy in config.policies):
        stand_in(built.state.parts)
    app = _Counting(built)
    options: dict[str, Any] = {"access_log": False, "timeout_graceful_shutdown": 5}
    uvicorn_server(app, port=config.port, **options).run()


if __name__ == "__main__":
    main()
