"""`make upgrade BEFORE=COMMIT`: servers of that commit give way to those of this tree, and come back, under traffic.

Real servers on sockets over their trees' own FakeBackend, on one registry: two of the commit, then one of each, two of
this tree, one of each again, and two of the commit. Clients ask them in turn and promotes go through each. Counted are
answers that failed, and answers by another version than the one that was live all the while.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import httpx

from tests.support import postgres, tiny
from tests.support.app import upload
from tests.support.fleet_traffic import Asked, Traffic
from tests.support.server import ROOT

SERVER = """
import sys
from dataclasses import replace
import uvicorn
from serve.config import keys_hashed, load
from tests.support.backend import FakeBackend
try:
    from serve.server.assembly import build_app
except ImportError:
    from serve.api.app import build_app
port, data, registry, blobs, model = sys.argv[1:]
flags = [model, "--name", "base", "--data-dir", data, "--registry", registry, "--blobs", blobs]
config = replace(load(flags, {}), admin_keys=keys_hashed(["run"]))
app = build_app(config, FakeBackend(model))
options = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 5, "timeout_keep_alive": 120}
uvicorn.run(app, host="127.0.0.1", port=int(port), **options)
"""
HEADERS = {"authorization": "Bearer run"}


class Running:
    """A server of a tree, in a process of its own."""

    def __init__(self, tree: Path, work: Path, name: str, registry: str) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = [str(port), str(work / name), registry, f"file://{work}/blobs", str(work / "model")]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self._log = (work / f"{name}.log").open("ab")
        command = [sys.executable, "-c", SERVER, *arguments]
        self._process = subprocess.Popen(command, env=environment, cwd=tree, stdout=self._log, stderr=self._log)
        for _ in range(600):
            if self._process.poll() is not None:
                raise SystemExit(f"{name} does not start: {(work / f'{name}.log').read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.url}/ready", headers=HEADERS).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise SystemExit(f"{name} is not ready within a minute")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def promoted(traffic: Traffic, count: int) -> None:
    """So many promotes, through each server in turn."""
    for turn in range(count):
        server = traffic.servers[turn % len(traffic.servers)]
        version = 1 + traffic.changes % 2
        traffic.change(version, partial(promote, server, version))
        time.sleep(0.05)


def promote(server: Asked, version: int) -> None:
    told = httpx.post(f"{server.url}/v1/adapters/tone/promote", json={"version": version}, headers=HEADERS)
    told.raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", help="the commit that is upgraded from")
    parser.add_argument("--postgres", action="store_true", help="the registry is in PostgreSQL, else in SQLite")
    parser.add_argument("--promotes", type=int, default=12, help="in each of the five phases")
    options = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old = work / "before"
        old.mkdir()
        archive = subprocess.run(
            ["git", "archive", options.before], cwd=ROOT, stdout=subprocess.PIPE, check=True
        ).stdout
        subprocess.run(["tar", "x"], cwd=old, input=archive, check=True)
        (work / "model").mkdir()
        tiny.model(work / "model")
        registry = f"sqlite:///{work}/registry.db"
        if options.postgres:
            programs = postgres.programs()
            assert programs, "PostgreSQL is not installed"
            registry = postgres.database(stack.enter_context(postgres.running(programs)))
        print(json.dumps(upgraded(old, work, registry, options.promotes), indent=1))


def upgraded(old: Path, work: Path, registry: str, promotes: int) -> dict[str, object]:
    first = Running(old, work, "old-1", registry)
    ids = {}
    for seed in (0, 1):
        arguments = upload(tiny.adapter(work / f"adapter-{seed}", seed, 2))
        pushed = httpx.post(f"{first.url}/v1/adapters", headers=HEADERS, timeout=30, **arguments)
        pushed.raise_for_status()
        ids[seed + 1] = pushed.json()["id"]
    traffic = Traffic("tone", ids, 2, 4, HEADERS)
    key = httpx.post(f"{first.url}/v1/keys", json={"name": "ci"}, headers=HEADERS)
    key.raise_for_status()
    running = [first, Running(old, work, "old-2", registry)]
    traffic.servers = running
    with traffic.running():
        promoted(traffic, promotes)
        for number, (tree, name) in enumerate(((ROOT, "new-1"), (ROOT, "new-2"), (old, "back-1"), (old, "back-2"))):
            fresh = Running(tree, work, name, registry)
            leaving, staying = running
            running = [staying, fresh]
            traffic.servers = running
            time.sleep(0.5)  # what was sent to it is answered
            leaving.stop()
            promoted(traffic, promotes)
            rows = httpx.get(f"{fresh.url}/v1/replicas", headers=HEADERS).json()["data"]
            print(
                f"{number + 1}: {', '.join(server.name for server in traffic.servers)}; {len(rows)} listed", flush=True
            )
        bearer = {"authorization": f"Bearer {key.json()['secret']}"}
        for server in traffic.servers:
            assert httpx.get(f"{server.url}/v1/models", headers=bearer).status_code == 200
        history = httpx.get(f"{traffic.servers[0].url}/v1/adapters/tone", headers=HEADERS).json()["history"]
    for server in running:
        server.stop()
    told = sum(row["what"] == "promote" for row in history)
    return {**dict(traffic.counts), "failed": traffic.counts["failed"], "stale": traffic.counts["stale"],
            "promotes in the history": told, "wrong": [asdict(each) for each in traffic.wrong[:5]]}  # fmt: skip


if __name__ == "__main__":
    main()
