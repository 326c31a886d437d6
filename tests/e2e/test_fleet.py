"""The real engine dies and hangs; the server does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import BASE, SMALL, Answer, Server, alive, descendants, done, eventually
from tests.lora import WORDS, variant

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STREAMS = 8
ADAPTERS = 16


@pytest.fixture(scope="module")
def fleet(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with 16 adapters, one of them pinned, that notices a hang after 10 s."""
    folder = tmp_path_factory.mktemp("fleet")
    with Server(folder / "data", folder / "log", "--hang-timeout", "10", "--restart-wait", "120", *SMALL) as server:
        for number in range(ADAPTERS):
            word = WORDS[number % len(WORDS)]
            lora = variant(adapters[word], folder / f"lora-{number}", scale=1 + number / 100)
            done(server.upload(f"a{number}", lora))
        done(server.http.post("/v1/adapters/a3/pin"))
        yield server


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


def engines(server: Server) -> set[int]:
    """The engine's processes, without Python's resource tracker."""
    found = descendants(server.process.pid)
    return {pid for pid in found if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()}


class Crowd:
    """Streams that begin again as soon as they end, until told to stop; `ends` holds how each ended."""

    def __init__(self, server: Server, count: int = STREAMS) -> None:
        self.server = server
        self.ends: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request never ended"

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            answer = Answer()
            try:
                for _ in self.server.answering(answer, f"a{number}", "Tell me everything.", tokens=40):
                    pass
                end = "whole" if answer.done and answer.word == word(number) else f"wrong: {answer.text}"
            except AssertionError as error:
                end = str(error)
            except httpx.HTTPError as error:
                end = repr(error)
            self.ends.append((time.monotonic(), end))


def test_a_killed_engine_comes_back_with_its_adapters_and_the_server_never_falters(fleet):
    before = done(fleet.http.get("/v1/engines"))["data"][0]
    assert before["restarts"] == 0
    with Crowd(fleet) as crowd:
        assert eventually(lambda: sum(end == "whole" for _, end in crowd.ends) >= 4, 90), crowd.ends
        victims = engines(fleet)
        killed = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: fleet.http.get("/ready").status_code == 503, 2), "nobody noticed"
        noticed = time.monotonic() - killed
        assert fleet.http.get("/health").status_code == 200
        assert eventually(lambda: fleet.http.get("/ready").status_code == 200, 120)
        back = time.monotonic() - killed
        row = done(fleet.http.get("/v1/engines"))["data"][0]
        assert len(row["resident"]) == ADAPTERS, "it was ready before its adapters were there"
        assert row["restarts"] == 1
        count = len(crowd.ends)
        assert eventually(lambda: len(crowd.ends) > count + STREAMS, 120)
    broken = [(when - killed, end) for when, end in crowd.ends if end != "whole"]
    assert len(broken) <= STREAMS, broken
    assert all("503" in end and when < 2 for when, end in broken), broken
    assert not alive(victims)
    print(f"noticed after {noticed:.2f} s, ready after {back:.1f} s; a warm start takes {fleet.seconds_to_ready:.1f} s")


def test_an_engine_that_hangs_is_replaced_and_who_waited_is_told(fleet):
    (before,) = done(fleet.http.get("/v1/engines"))["data"]
    victims = engines(fleet)
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    told = fleet.http.post("/v1/completions", json={"model": "a1", "prompt": "x", "max_tokens": 4})
    assert told.status_code == 503
    assert "no step" in told.json()["error"]["message"]
    assert int(told.headers["retry-after"]) >= 1
    assert 10 <= time.monotonic() - began < 13
    assert eventually(lambda: fleet.http.get("/ready").status_code == 200, 120)
    assert fleet.ask("a1").word == word(1)
    assert not alive(victims)
    (after,) = done(fleet.http.get("/v1/engines"))["data"]
    assert after["restarts"] == before["restarts"] + 1
    assert fleet.ask(BASE).done


def test_descriptors_and_memory_return_to_where_they_were(fleet):
    def descriptors() -> int:
        return len(list(Path(f"/proc/{fleet.process.pid}/fd").iterdir()))

    before = descriptors()
    for pid in engines(fleet):
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: fleet.http.get("/ready").status_code == 503, 2)
    assert eventually(lambda: fleet.http.get("/ready").status_code == 200, 120)
    fleet.ask("a1")
    assert eventually(lambda: descriptors() <= before + 2, 10), f"{descriptors()} descriptors, {before} before"
