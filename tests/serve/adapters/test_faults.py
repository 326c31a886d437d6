"""What fails around a server (its disk, database, descriptors, clients) is nobody's matter but whose it is.

A real process with real sockets, files and limits; only the engine is none. `make chaos` does the same with one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support import crowd as faults
from tests.support.app import upload
from tests.support.server import environment, free_port
from tests.support.waiting import eventually


@dataclass(frozen=True, slots=True)
class Said:
    word: str


class Lone:
    """As much of tests.e2e.server.Server as the faults ask for; every adapter says the word that it ought to."""

    def __init__(self, model: Path, data: Path) -> None:
        self.data, self.port = data, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        command = [sys.executable, "-m", "tests.support.lone", str(model), str(data), str(self.port)]
        self.process = subprocess.Popen(command, env=environment())

    def ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def upload(self, name: str, folder: Path) -> httpx.Response:
        return self.http.post("/v1/adapters", **upload(folder, name))

    def ask(self, model: str) -> Said:
        told = httpx.post(f"{self.url}/v1/completions", json={"model": model, "prompt": "x"}, timeout=60)
        assert told.status_code == 200, told.text
        return Said(faults.word(int(model[1:])))


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """On a small disk of its own, where one may be mounted."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def lone(tiny_model: Path, data: Path, make_adapter: Callable[..., Path]) -> Iterator[Lone]:
    server = Lone(tiny_model, data)
    try:
        assert eventually(server.ready)
        assert server.upload("a2", make_adapter(2)).status_code == 201
        yield server
    finally:
        server.http.close()
        server.process.kill()
        server.process.wait()


def test_what_fails_around_it_leaves_it_as_it_was(lone, make_adapter):
    before = faults.descriptors(lone)
    faults.slow_readers(lone)
    faults.half_open(lone)
    faults.descriptors_exhausted(lone)
    for number, change in enumerate((faults.registry_locked, faults.blobs_gone)):
        change(lone, make_adapter(10 + number))
    if os.path.ismount(lone.data):
        faults.disk_full(lone, make_adapter(20))
    assert lone.upload("a3", make_adapter(3)).status_code == 201, "it takes changes again"
    assert lone.ask("a3").word
    assert lone.http.get("/v1/engines").json()["data"][0]["leases"] == 0
    assert eventually(lambda: faults.descriptors(lone) <= before + 4), faults.descriptors(lone)


def test_half_a_request_costs_its_connection_no_longer_than_the_client_may_wait(lone):
    with faults._sockets(lone, 3) as socks:
        for sock in socks:
            sock.settimeout(60)  # half of what an idle connection has
        silent, header, body = socks
        header.send(b"POST /v1/comp")
        body.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert silent.recv(100) == b"" and b"408" in header.recv(1000)
        assert b"408" in body.recv(1000)
