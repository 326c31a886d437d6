"""Clients that ask the servers of one registry in turn, and hold each answer against what was live all the while."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

# Between two requests of a client, and after one that failed.
PACE_SECONDS, PAUSE_SECONDS = 0.01, 0.05


class Asked(Protocol):
    """A server that is asked."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """An answer that failed, or was by an old version."""

    when: float
    server: str
    kind: str
    text: str


class Traffic:
    """`servers` are asked in turn, with the live version of `name`, whose ids are given by version.

    Whoever changes what is live says so by `change`: while a change is under way, and where nobody knows how it ended,
    no answer is held against a version.
    """

    def __init__(self, name: str, ids: Mapping[int, str], live: int, clients: int, headers: Mapping[str, str]) -> None:
        self.servers: Sequence[Asked] = []
        self.name = name
        self.ids = ids
        self.changes = 0
        self.counts: Counter[str] = Counter()
        self.wrong: list[Wrong] = []
        self.slowest = 0.0
        self._live: int | None = live
        self._headers = dict(headers)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    @property
    def live(self) -> int | None:
        """The version that was acknowledged last; None where nobody knows."""
        return self._live

    def change(self, version: int, make: Callable[[], object]) -> None:
        """Make `version` live by `make`, and hold answers against it from then on; after an error, against none."""
        self._live = None
        make()
        self.changes += 1
        self._live = version

    def forget(self) -> None:
        """Nobody knows which version is live."""
        self._live = None

    def more(self, count: int, seconds: float = 120) -> None:
        """Wait until so many more requests were answered."""
        target, end = self.counts["answered"] + count, time.monotonic() + seconds
        while self.counts["answered"] < target:
            if time.monotonic() > end:
                raise AssertionError(f"no {count} answers within {seconds} s: {self.counts}, {self.wrong[-3:]}")
            time.sleep(0.02)

    def since(self, when: float) -> list[Wrong]:
        """What went wrong from then on."""
        return [each for each in self.wrong if each.when >= when]

    def _ask(self, number: int) -> None:
        body = {"model": self.name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        with httpx.Client(headers=self._headers, timeout=60) as client:
            while not self._stop.is_set():
                number += 1
                if not (servers := self.servers):
                    time.sleep(PAUSE_SECONDS)
                    continue
                server = servers[number % len(servers)]
                before, began = (self._live, self.changes), time.monotonic()
                try:
                    answer = client.post(f"{server.url}/v1/chat/completions", json=body)
                except httpx.HTTPError as error:
                    self._failed(server, repr(error))
                    continue
                if answer.status_code != 200:
                    self._failed(server, f"{answer.status_code}: {answer.text[:300]}")
                    continue
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.counts["answered"] += 1
                self._hold(server, before, answer.json())
                time.sleep(PACE_SECONDS)

    def _hold(self, server: Asked, before: tuple[int | None, int], answer: Mapping[str, Any]) -> None:
        live = before[0]
        if live is None or before != (self._live, self.changes):
            return
        self.counts["held"] += 1
        if answer["model"] != self.ids[live]:
            self._note(server, "stale", f"{answer['model']} answered, and v{live} is live")

    def _failed(self, server: Asked, text: str) -> None:
        # What was about to be sent to a server that is asked no more goes to another one.
        if server in self.servers:
            self._note(server, "failed", text)
        time.sleep(PAUSE_SECONDS)

    def _note(self, server: Asked, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.wrong.append(Wrong(time.monotonic(), server.name, kind, text))
