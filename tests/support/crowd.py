"""Streams that never stop asking, and the faults that are done to a server meanwhile."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.lora import WORDS, variant
from tests.support.other_kinds import as_dora, as_loha, with_tokens
from tests.support.server import Answer, Server, alive, descendants, done
from tests.support.waiting import eventually

STREAMS = 16
ADAPTERS = 16
# What is not a LoRA, by its number.
Others = Mapping[int, Callable[[Path, Path], Any]]
OTHERS: Others = {1: as_dora, 2: with_tokens, 4: as_dora, 5: with_tokens, 6: as_loha}
# Both are LoRAs that say the same.
MIXTURE = "a0:0.5+a3:0.5"
# No request takes longer than this, whatever happens to it.
DEADLINE = 60


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


def engines(server: Server) -> set[int]:
    """The engines' processes, without Python's helpers and the process that they are forked from."""
    mine = str(server.process.pid)
    found = set()
    for pid in descendants(server.process.pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if "resource_tracker" not in command and not (parent == mine and "fork server" in command):
                found.add(pid)
    return found


@dataclass
class End:
    """How a request ended, and the pauses between its pieces."""

    at: float
    said: str
    pauses: list[float] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.said == "whole"


class Crowd:
    """Streams that begin again as soon as they end, until told to stop."""

    def __init__(self, server: Server, count: int = STREAMS) -> None:
        self.server = server
        self.ends: list[End] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def __enter__(self) -> Crowd:
        self.server.http.headers["X-Request-Timeout"] = str(DEADLINE)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request never ended"
        # Its idle connections would count as the server's descriptors.
        self.server.http.close()
        headers = {key: value for key, value in self.server.http.headers.items() if key != "x-request-timeout"}
        self.server.http = httpx.Client(base_url=self.server.url, timeout=120, headers=headers)

    def whole(self, more: int, seconds: float = 120) -> None:
        """Wait until so many more requests ended well."""
        count = sum(end.whole for end in self.ends)
        assert eventually(lambda: sum(end.whole for end in self.ends) >= count + more, seconds), self.ends

    @property
    def broken(self) -> list[End]:
        return [end for end in self.ends if not end.whole]

    def _ask(self, number: int) -> None:
        model = f"a{number}" if number < ADAPTERS - 1 else MIXTURE
        while not self._stop.is_set():
            answer, times, began = Answer(), [], time.monotonic()
            try:
                for _ in self.server.answering(answer, model, "Tell me everything.", tokens=16):
                    times.append(time.monotonic())
                said = "whole" if answer.done and answer.word == word(number) else f"wrong: {answer.text}"
            except AssertionError as error:
                said = str(error)
            except httpx.HTTPError as error:
                said = repr(error)
            if time.monotonic() - began > DEADLINE + 5:
                said = f"late: {time.monotonic() - began:.0f} s, {said}"
            pauses = [after - before for before, after in itertools.pairwise(times)]
            self.ends.append(End(time.monotonic(), said, pauses))
            if said != "whole":
                time.sleep(0.2)


def p99(ends: list[End]) -> float:
    pauses = sorted(pause for end in ends for pause in end.pauses)
    return pauses[int(len(pauses) * 0.99)] if pauses else 0.0


def row(server: Server) -> dict[str, Any]:
    (found,) = done(server.http.get("/v1/engines"))["data"]
    return found


def residents(server: Server) -> list[str]:
    """The versions that its engine holds, without mixtures of them."""
    return [id for id in row(server)["resident"] if "+" not in id]


def descriptors(server: Server) -> int:
    """How many files and sockets the server has open, but for its registry's pool, which grows to what it may have."""
    files = []
    for each in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            files.append(os.readlink(each))
    return sum("registry.sqlite" not in file for file in files)


def memory(server: Server) -> float:
    """MiB that no file backs, of the server and its engine."""
    total = 0
    for pid in {server.process.pid, *server.family}:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return total / 1024


def stock(server: Server, adapters: dict[str, Path], folder: Path, others: Others = OTHERS) -> None:
    """16 adapters, some of other kinds than LoRA, one of them pinned."""
    for number in range(ADAPTERS):
        lora = folder / f"lora-{number}"
        if not lora.exists():
            variant(adapters[word(number)], lora, scale=1 + number / 100)
            if make := others.get(number):
                make(lora, lora)
        done(server.upload(f"a{number}", lora))
    done(server.http.post("/v1/adapters/a3/pin"))


# Faults. Each says what was seen, and leaves the server as it was.


def engine_killed(server: Server) -> str:
    return _replaced(server, signal.SIGKILL, 10)


def all_but_the_server_killed(server: Server) -> str:
    """Also the process that engines are forked from."""
    began = time.monotonic()
    for pid in descendants(server.process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: server.http.get("/ready").status_code == 503), "nobody noticed"
    assert eventually(lambda: server.http.get("/ready").status_code == 200, 180)
    return f"ready after {time.monotonic() - began:.0f} s"


def engine_hung(server: Server) -> str:
    return _replaced(server, signal.SIGSTOP, 20)


def _replaced(server: Server, number: int, notice: float) -> str:
    # The kernel may leave children out of its list while others come and go.
    victims, began = eventually(lambda: engines(server)), time.monotonic()
    assert victims, "no engine was found"
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    assert eventually(lambda: server.http.get("/ready").status_code == 503, notice), "nobody noticed"
    noticed = time.monotonic() - began
    assert server.http.get("/health").status_code == 200
    assert eventually(lambda: server.http.get("/ready").status_code == 200, 180)
    assert not alive(victims)
    assert len(residents(server)) >= ADAPTERS
    return f"noticed after {noticed:.1f} s, ready after {time.monotonic() - began:.0f} s"


def slow_readers(server: Server) -> str:
    """Clients that ask for a long stream and read nothing of it."""
    body = b'{"model": "a1", "prompt": "x", "max_tokens": 400, "stream": true, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with _sockets(server, 8) as socks:
        for sock in socks:
            sock.send(head % len(body) + body)
        assert server.ask("a2").word == word(2)
    return "others are answered; their leaving frees everything"


def half_open(server: Server) -> str:
    """Clients that send half a header, half a body, or nothing, and stay."""
    parts = (
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    )
    with _sockets(server, 30) as socks:
        for number, sock in enumerate(socks):
            sock.send(parts[number % len(parts)])
        assert server.ask("a2").word == word(2)
    return "others are answered"


def descriptors_exhausted(server: Server) -> str:
    """The server may not open one more descriptor for five seconds."""
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), limits[1]))
    try:
        with _sockets(server, 20):
            time.sleep(5)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert eventually(lambda: _healthy(server)), "it takes no connection any more"
    assert server.ask("a2").word == word(2)
    return "connections that are there go on, new ones wait until there is room"


def registry_locked(server: Server, lora: Path) -> str:
    """Somebody else holds the registry's write lock for longer than it waits for it."""
    with closing(sqlite3.connect(server.data / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = server.upload("locked", lora)
        assert server.ask("a2").word == word(2)
        other.execute("ROLLBACK")
    assert refused.status_code == 503, refused.text
    assert server.http.get("/v1/adapters/locked").status_code == 404
    return "answers go on; a push gets 503 and leaves nothing"


def blobs_gone(server: Server, lora: Path) -> str:
    """The folder of the adapters' bytes is out of reach."""
    blobs, away = server.data / "blobs", server.data / "away"
    blobs.rename(away)
    try:
        refused = server.upload("lost", lora)
        assert server.ask("a2").word == word(2), "what is loaded needs no folder"
    finally:
        with suppress(FileNotFoundError):
            blobs.rmdir()
        away.rename(blobs)
    assert refused.status_code >= 500, refused.text
    assert server.http.get("/v1/adapters/lost").status_code == 404
    return f"what is loaded answers; a push gets {refused.status_code}"


def disk_full(server: Server, lora: Path) -> str:
    """The data directory's disk, a small one of its own, has no byte left."""
    filler = server.data / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    try:
        refused = server.upload("full", lora)
        assert server.ask("a2").word == word(2)
    finally:
        filler.unlink()
    assert refused.status_code == 507, refused.text
    assert server.http.get("/v1/adapters/full").status_code == 404
    return "answers go on; a push gets 507 and leaves nothing"


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


class _sockets:
    """Connections of clients that do as they are told; gone at the end."""

    def __init__(self, server: Server, count: int) -> None:
        self._socks = []
        for _ in range(count):
            sock = socket.socket()
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self._socks.append(sock)
            with suppress(OSError):
                sock.connect(("127.0.0.1", server.port))

    def __enter__(self) -> list[socket.socket]:
        return self._socks

    def __exit__(self, *_: object) -> None:
        for sock in self._socks:
            sock.close()
