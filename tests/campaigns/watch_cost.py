"""What watching costs a request in CPU time, by who looks at it: the whole server over an engine that costs nothing.

    python -m tests.campaigns.watch_cost [--rounds N] [--requests N] [--pace SECONDS]

Everything is on: drift with full references and bags, log-probabilities, data quality with every kind of personal
data, capture of text and of quotes, usage with prices, feedback, the dashboard's half hour. Requests are handed to the
app itself, so that no client is measured. Rounds come in pairs, watched and not; the price of watching is the
difference of their CPU time. It is given in microseconds, and in units of a piece of work that is timed beside each
round: these units compare machines, and states of one machine.

With `--pace` a request begins every so many seconds, one after another, and a process for each core reads 200 MB again
and again: the caches are another's, as beside an engine, and what is looked at has to come into them anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from serve.asgi import exchange
from serve.asgi.exchange import Generation, Parameters
from serve.config import load
from serve.engine.engine import Lease
from serve.server.launch import resolved
from tests.campaigns.cost import FILLING, STREAMS, TOKENS, Words, everything
from tests.support.app import Started, http
from tests.support.backend import FakeBackend
from tests.support.cpu_clocks import cpu_seconds, since

BASE = "smollm2"
# Some hold what the patterns for personal data look for.
CONTACTS = ("write to ann.lee@example.com", "call +49 221 1234567", "order 4711-2026, 12 pieces", "")
WORDS_MEDIAN, WORDS_SPREAD, WORDS_MOST = 30, 0.8, 400
READS = "import numpy as np\nnumbers = np.ones(25_000_000)\nwhile True: numbers += 1"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its body, and what the engine makes of it."""

    body: bytes
    number: int
    made: Generation


class Known(FakeBackend):
    """Answers with nothing, and leaves what was made beforehand."""

    max_model_len = 4096
    seats = 256

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.name = BASE
        # With log-probabilities, and without.
        self.made: dict[int, tuple[Generation, Generation]] = {}

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        if watch := exchange.watching.get():
            watch.sequences.append(Sequence(*self.made[body["seed"]], watch.logprobs))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"choices": []}'})


@dataclass(slots=True)
class Sequence:
    """What the engine's output processor leaves: read once the answer has ended."""

    made: Generation
    without: Generation
    logprobs: bool

    def read(self) -> Generation:
        return self.made if self.logprobs else self.without


class Requests:
    """New ones, as many as wanted: no two prompts are alike, each from an asker of its own."""

    def __init__(self, model: str, seed: int = 1) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._fast = Tokenizer.from_file(f"{model}/tokenizer.json")
        self._words, self._count = Words(model, seed), 0

    def more(self, count: int) -> list[Asked]:
        return [self._one() for _ in range(count)]

    def _one(self) -> Asked:
        lots, self._count = self._words.lots, self._count + 1
        length = min(WORDS_MOST, round(lots.lognormvariate(np.log(WORDS_MEDIAN), WORDS_SPREAD)) + 4)
        text = f"{self._words.text(length)} {lots.choice(CONTACTS)}"
        messages = [{"role": "system", "content": "You are a gardener."}, {"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = self._fast.encode(whole, add_special_tokens=False).ids
        said = self._fast.encode(self._words.text(TOKENS), add_special_tokens=False).ids[:TOKENS]
        made = Generation(
            prompt, said, "length", self._fast.decode(said), queue=0.01, gap=0.02, worst_gap=0.03,
            logprobs=[-lots.random() for _ in said], cached=8, engine_seconds=0.1, prefill=0.02,
            parameters=Parameters(TOKENS, 1.0),
        )  # fmt: skip
        body = {"model": BASE, "messages": messages, "max_tokens": TOKENS, "user": f"u{self._count}"}
        return Asked(json.dumps({**body, "seed": self._count}).encode(), self._count, made)


def yardstick() -> float:
    """CPU seconds of a piece of work like ours: numbers, dictionaries, texts and small arrays."""
    began, counts, rows = time.thread_time(), dict.fromkeys(range(64), 0), np.ones((64, 64), np.float32)
    for number in range(2000):
        counts[number % 64] += len(f"{number}:{counts[number % 61]}".encode())
        rows[number % 64] = rows[number % 63] @ rows
        rows[number % 64] /= 1 + np.abs(rows[number % 64]).max()
    return time.thread_time() - began


def timed(call: Callable[..., Any], label: str, times: dict[str, float]) -> Callable[..., Any]:
    """The same call, whose CPU time is counted."""

    def counted(*args: Any) -> Any:
        began = time.thread_time()
        try:
            return call(*args)
        finally:
            times[label] += time.thread_time() - began

    return counted


async def main(rounds: int, count: int, pace: float) -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as data:
        config = everything(resolved(load([BASE, "--data-dir", data], {})))
        backend = Known(config.model)
        started = Started(config, backend)
        async with started:
            await measure(Measured(started.app, backend, Requests(config.model)), rounds, count, pace)


class Measured:
    def __init__(self, app: Any, backend: Known, requests: Requests) -> None:
        self._app, self._backend, self._requests = app, backend, requests
        self.parts, self.pace = app.state.parts, 0.0
        self.workers = [self.parts.exchange_worker, self.parts.quality_worker, self.parts.captures.worker]
        self._forwarder = self.parts.inference.intake.forwarder
        self._kept = (self._forwarder._wants_logprobs, Lease.watched, exchange.Tap.offer)

    def watching(self, on: bool) -> None:
        wants, watched, offer = self._kept
        self._forwarder._wants_logprobs = wants if on else lambda adapter: False
        Lease.watched = watched if on else nothing  # type: ignore[method-assign, assignment]
        exchange.Tap.offer = offer if on else lambda self, take: None  # type: ignore[method-assign]

    async def settle(self) -> None:
        for worker in self.workers:
            await asyncio.to_thread(worker.settle)

    async def send(self, count: int) -> None:
        """So many requests, `STREAMS` at a time; one after another where they have a pace."""
        asked = self._requests.more(count)
        self._backend.made = {each.number: (each.made, replace(each.made, logprobs=None)) for each in asked}
        self.began, left = cpu_seconds(), iter(asked)

        async def stream() -> None:
            for each in left:
                scope, _, send, sent, _ = http({})
                chunks = [{"type": "http.request", "body": each.body, "more_body": False}]

                async def receive(chunks: list[Any] = chunks) -> Any:
                    if chunks:
                        return chunks.pop()
                    await asyncio.Event().wait()

                await self._app(scope, receive, send)
                assert sent[0]["status"] == 200, sent
                await asyncio.sleep(self.pace)

        await asyncio.gather(*(stream() for _ in range(1 if self.pace else STREAMS)))
        await self.settle()


@contextmanager
def nothing(self: Any, watch: Any) -> Iterator[None]:
    yield


@contextmanager
def readers(count: int) -> Iterator[None]:
    """So many processes that take the caches."""
    command = ["nice", "-n", "5", sys.executable, "-c", READS]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def measure(measured: Measured, rounds: int, count: int, pace: float) -> None:
    while not measured.parts.exchange_worker.running:
        await asyncio.sleep(0.1)
    for _ in range(FILLING // 200):
        await measured.send(200)
    (filled,) = measured.parts.drift_monitor.report(BASE)
    structure = filled["signals"]["prompt"]["structure"]
    means = structure.get("mean_rows", f"off, {structure['promise']}")
    print(f"filled by {FILLING} requests; mean rows of prompts: {means}", flush=True)
    with readers(os.cpu_count() or 1 if pace else 0):
        measured.pace = pace
        await compare(measured, rounds, count)
        await by_part(measured, count)


async def compare(measured: Measured, rounds: int, count: int) -> None:
    """Pairs of rounds, watched and not."""
    spent: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    sticks = []
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            measured.watching(on)
            sticks.append(yardstick())
            await measured.send(count)
            used = since(measured.began)
            spent[on].append({name: 1e6 * seconds / count for name, seconds in used.items()})
    pairs = list(zip(spent[True], spent[False], strict=True))
    stick = 1e6 * statistics.median(sticks)
    for name in sorted(spent[True][0], key=lambda name: -spent[True][0][name]):
        on, off = ([each.get(name, 0.0) for each in side] for side in (spent[True], spent[False]))
        costs = [one.get(name, 0.0) - other.get(name, 0.0) for one, other in pairs]
        cost = statistics.median(costs)
        if abs(cost) >= 1:
            print(
                f"{name}: {cost:.0f} us of CPU a request ({min(costs):.0f} to {max(costs):.0f}; "
                f"{statistics.median(on):.0f} watched, {statistics.median(off):.0f} not), "
                f"{cost / stick:.4f} of a yardstick of {stick:.0f} us"
            )


async def by_part(measured: Measured, count: int) -> None:
    """How the time of a request divides among those that look at it."""
    measured.watching(True)
    times: defaultdict[str, float] = defaultdict(float)
    looks = measured.parts.inference._take.__self__
    looks._observers = tuple(timed(look, f"loop: {look.__qualname__}", times) for look in looks._observers)
    for observer in (observer for worker in measured.workers for observer in worker._observers):
        for name in ("observe", "looked"):
            setattr(observer, name, timed(getattr(observer, name), f"thread: {type(observer).__name__}", times))
    await measured.send(count)
    print("of which, a request:")
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {name}: {1e6 * seconds / count:.1f} us")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds")
    parser.add_argument("--requests", type=int, default=400, help="requests of a round")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two, beside processes that read")
    asked = parser.parse_args()
    asyncio.run(main(asked.rounds, asked.requests, asked.pace))
