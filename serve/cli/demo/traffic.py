"""Customers of the demo: threads that ask the adapter, each request by somebody else."""

from __future__ import annotations

import itertools
import random
import threading
from types import TracebackType
from typing import Self

import httpx

from serve.cli.demo import texts

STREAMS, TOKENS = 6, 32
PAUSE = 0.2  # seconds at most between an answer and the next question of a stream


class Traffic:
    """`with Traffic(url, key, name) as traffic`: it runs until the end."""

    def __init__(self, url: str, key: str | None, name: str, *, pause: float = PAUSE, seed: int = 7) -> None:
        self.name, self._pause = name, pause
        self.answered = self.failed = 0
        self._german = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=120.0)
        self._askers = itertools.count()
        self._ended = threading.Event()
        self._count = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed + number,)) for number in range(STREAMS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def speak_german(self) -> None:
        """Ask in another language from now on."""
        self._german = True

    def _ask(self, seed: int) -> None:
        dice = random.Random(seed)
        while not self._ended.wait(self._pause * dice.random()):
            question = texts.german(dice) if self._german else texts.english(dice)[0]
            done = answer(self._http, self.name, question, user=f"customer-{seed}-{next(self._askers)}") is not None
            with self._count:
                self.answered += done
                self.failed += not done


def answer(http: httpx.Client, model: str, question: str, user: str = "demo") -> str | None:
    """What the model says; None when the request failed."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "user": user}
    try:
        response = http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return None
        return str(response.json()["choices"][0]["message"]["content"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError):
        return None
