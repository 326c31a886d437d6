"""`make chaos`: one fault after the other, for as long as it is told, to a server that 16 streams never stop asking.

After each fault: everything that was acknowledged is there, no answer came from a wrong version, no request took longer
than its deadline; at the end memory and descriptors are where they began.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.support import crowd as faults
from tests.support.crowd import Crowd, descriptors, row, stock, word
from tests.support.lora import WORDS, variant
from tests.support.other_kinds import as_dora, as_loha, with_tokens
from tests.support.server import SMALL, Server, done, tail
from tests.support.waiting import eventually

SECONDS = int(os.environ.get("LORADOCK_TEST_CHAOS_SECONDS", "0"))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(SECONDS + 1200),
    pytest.mark.skipif(not SECONDS, reason="minutes long: `make chaos`; test_fleet and test_faults are short"),
]
FLAGS = ("--hang-timeout", "10", "--restart-wait", "50", "--max-restarts", "1000", "--client-timeout", "10", *SMALL)
CLEAN = re.compile(r"whole|(503|429|504): |the stream broke off: .*'code': (503|504)")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own for the data directory, where that may be mounted; else a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


class Acknowledged:
    """What the server said that it did; it must never forget it."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}

    def change(self, server: Server, pushed: list[Path], draw: random.Random) -> None:
        """One push, promote or rollback; remembered if it was acknowledged."""
        name = f"c{draw.randrange(4)}"
        with suppress(httpx.TransportError):
            if name in self.live and draw.random() < 0.5:
                number = draw.randint(1, self.live[name])
                told = server.http.post(f"/v1/adapters/{name}/promote", json={"version": number})
            else:
                told = server.upload(name, draw.choice(pushed))
            if told.is_success:
                self.live[name] = told.json()["version"]
            return
        self.live.pop(name, None)  # torn: it may have happened or not

    def hold(self, server: Server) -> None:
        for name, version in self.live.items():
            assert done(server.http.get(f"/v1/adapters/{name}"))["live"] == version, name


def test_whatever_is_done_to_it_nothing_acknowledged_is_lost_and_no_answer_is_wrong(adapters, disk, tmp_path):
    draw = random.Random(SECONDS)
    pushed = [
        make(variant(adapters[name], tmp_path / name, scale=1.25), tmp_path / f"more-{name}")
        for name, make in zip(WORDS, (as_dora, with_tokens, as_loha), strict=True)
    ]
    table: dict[str, list[str]] = {}
    ends: Counter[str] = Counter()
    stated = Acknowledged()
    began = time.monotonic()
    server = Server(disk, tmp_path / "log", *FLAGS).__enter__()
    try:
        stock(server, adapters, tmp_path)
        names: dict[str, Callable[[Server], str]] = {
            "engine killed": faults.engine_killed,
            "engine hung": faults.engine_hung,
            "its helpers killed": faults.all_but_the_server_killed,
            "slow readers": faults.slow_readers,
            "half-open clients": faults.half_open,
            "descriptors exhausted": faults.descriptors_exhausted,
            "registry locked": lambda server: faults.registry_locked(server, pushed[0]),
            "blob store gone": lambda server: faults.blobs_gone(server, pushed[1]),
            "server killed": lambda server: "",
        }
        if os.path.ismount(disk):
            names["disk full"] = lambda server: faults.disk_full(server, pushed[2])
        start = None
        for name in itertools.cycle(names):
            if time.monotonic() - began > SECONDS and set(names) <= set(table):
                break
            with Crowd(server) as crowd:
                crowd.whole(faults.STREAMS, 180)
                stated.change(server, pushed, draw)
                if name == "server killed":
                    killed = time.monotonic()
                    server.process.kill()
                    server.process.wait()
                else:
                    seen = names[name](server)
                    table.setdefault(name, []).append(seen)
                    stated.change(server, pushed, draw)
                    crowd.whole(4, 180)
            kinds = [_kind(end.said, name) for end in crowd.ends]
            ends.update(kinds)
            assert not any(kind.startswith("BAD") for kind in kinds), Counter(kinds)
            if name == "server killed":
                server.__exit__()
                server = Server(disk, tmp_path / "log", *FLAGS).__enter__()
                table.setdefault(name, []).append(f"ready again after {time.monotonic() - killed:.0f} s")
            stated.hold(server)
            assert eventually(lambda: row(server)["leases"] == 0, 90), "somebody's turn was never given back"  # noqa: B023
            time.sleep(12)  # until those that sent half a request are let go
            now = (descriptors(server), _memory(server.process.pid))
            start = now if start is None or name == "server killed" else start
            assert now[0] <= start[0] + 12, f"{name}: {now[0]} descriptors, {start[0]} before"
            assert now[1] <= start[1] * 1.25 + (64 << 20), f"{name}: {now[1] >> 20} MiB, {start[1] >> 20} before"
            print(f"{time.monotonic() - began:6.0f} s {name}: {table[name][-1]}; {now[0]} descriptors, "
                  f"{now[1] >> 20} MiB", flush=True)  # fmt: skip
        assert server.ask("a1").word == word(1)
    except BaseException:
        print(tail(server.full_log, 100))
        raise
    finally:
        server.__exit__()
        for name, seen in table.items():
            print(f"{name} | {len(seen)} | {seen[-1]}")
        print(f"{time.monotonic() - began:.0f} s; how requests ended: {dict(ends)}")


def _kind(said: str, fault: str) -> str:
    """How a request ended, in a word; BAD for what must not be."""
    if said == "whole":
        return "whole"
    if CLEAN.match(said):
        return (re.search(r"50[34]|429", said) or ["?"])[0]
    if fault in ("server killed", "descriptors exhausted") and re.match(r"(\w*Error|\w*Timeout)\(", said):
        return "connection"
    return f"BAD {said[:300]}"


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
