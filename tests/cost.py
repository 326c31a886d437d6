"""What watching costs: one real server under 16 streams, whose watching goes on and off every few seconds.

    python -m tests.cost [PAIRS]

Prints tokens a second with and without, their ratio over all pairs, and the worker's CPU time a request. Slices are
short, so that other work on the machine, which comes and goes, meets both sides of most pairs alike; answers are short
too, so that nearly all of a slice was begun in it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import httpx
import uvicorn

from serve import tap
from serve.config import load
from serve.launch import resolved
from serve.tap import Exchange, Generation
from tests.e2e.server import SMALL, free_port
from tests.e2e.test_watching import GARDEN

STREAMS, TOKENS = 16, 32
# Seconds until the answers that began before a change have ended, and that are measured then.
SETTLING, MEASURED = 1.0, 2.0
# So many requests fill every reference and bag: an empty one costs less to look up.
FILLING = 2600


async def main(pairs: int) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        arguments = ["--port", str(port), "--data-dir", data, *SMALL]
        config = resolved(load(arguments, {}))
        from serve.app import build_app
        from serve.backend import VLLMBackend

        app = build_app(config, [VLLMBackend(one.model, one.name, one.engine) for one in config.bases])
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.1)
        await app.state.ready.wait()
        try:
            await measure(app, f"http://127.0.0.1:{port}/v1/chat/completions", pairs)
        finally:
            server.should_exit = True
            await serving


async def measure(app, url: str, pairs: int) -> None:
    watcher, inference = app.state.watcher, app.state.inference
    takes, wants, watched = inference._take, inference._wants_logprobs, tap.Tap.watched
    while not watcher.running:  # it reads the model's embedding table first
        await asyncio.sleep(0.1)
    await asyncio.to_thread(fill, watcher)
    async with load_of(url):
        await asyncio.sleep(8)  # the engine's first steps
        watcher._spent = watcher._taken = 0
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(pairs):
            for on in (True, False) if number % 2 else (False, True):
                tap.Tap.watched = watched if on else nothing
                inference._take = takes if on else lambda exchange: None
                inference._wants_logprobs = wants if on else lambda adapter: False
                await asyncio.sleep(SETTLING)
                began, before = time.perf_counter(), generated(app)
                await asyncio.sleep(MEASURED)
                found[on].append((generated(app) - before) / (time.perf_counter() - began))
    await asyncio.to_thread(watcher.settle)
    ratios = sorted(on / off for on, off in zip(found[True], found[False], strict=True))
    quarter = len(ratios) // 4
    for on, rates in found.items():
        print(f"{'on' if on else 'off'}: {statistics.median(rates):.1f} tokens/s in the median")
    print(
        f"on/off {statistics.median(ratios):.4f} in the median of {len(ratios)} pairs, the middle half from "
        f"{ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f}; of all tokens {sum(found[True]) / sum(found[False]):.4f}"
    )
    print(f"worker: {1e6 * watcher._spent / watcher._taken:.0f} us of CPU a request, over {watcher._taken} requests")


def generated(app) -> float:
    """Tokens that the engine has generated so far."""
    families = app.state.engine.backend.metrics()
    return sum(one.value for family in families for one in family.samples if one.name == "vllm:generation_tokens_total")


@contextmanager
def nothing(self):
    """In place of what lets the backend see the request's Watch."""
    yield


def fill(watcher) -> None:
    """Requests that no engine answered, until every detector holds as much as it ever does."""
    lots = random.Random(0)
    for number in range(FILLING):
        said = [*range(1, 25), *(lots.randrange(1000, 40_000) for _ in range(14)), 2, 3]
        made = Generation(said, [lots.randrange(500, 40_000) for _ in range(TOKENS)], "length", "a text")
        if number % 4 == 0:
            made = replace(made, logprobs=[-lots.random() for _ in range(TOKENS)])
        asker = f"filling {number}".encode()
        watcher.offer(Exchange("smollm2", "base", 200, 0.1, 1.0, asker=asker, generations=(made,)))
        if number % 500 == 0:
            watcher.settle()
    watcher.settle()
    (watched,) = watcher._versions.values()
    assert all(signal.samples for signal in watched.baseline.signals.values())


@asynccontextmanager
async def load_of(url: str) -> AsyncIterator[None]:
    """16 streams, one answer after another, asked by a process of its own."""
    client = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.cost", "client", url)
    try:
        yield
    finally:
        client.kill()
        await client.wait()


async def client(url: str) -> None:
    lots = random.Random()

    async with httpx.AsyncClient(timeout=300) as http:

        async def stream() -> None:
            while True:
                said = " ".join(lots.choices(GARDEN, k=12))
                body = {"model": "smollm2", "messages": [{"role": "user", "content": said}], "max_tokens": TOKENS}
                body |= {"ignore_eos": True, "stream": True, "user": str(lots.random())}
                async with http.stream("POST", url, json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        pass

        await asyncio.gather(*(stream() for _ in range(STREAMS)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        asyncio.run(client(sys.argv[2]))
    else:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
