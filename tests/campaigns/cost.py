"""What watching costs: one real server, whose watching goes on and off from round to round, under 16 streams.

    python -m tests.campaigns.cost [ROUNDS]

Prints tokens a second with and without, their ratio round by round, and CPU time a request: the watching thread's, and
by process and thread the difference between rounds with and without. `python -m tests.campaigns.watch_cost` tells more
of that, in seconds and without an engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import uvicorn
from transformers import AutoTokenizer

from serve.asgi import exchange
from serve.asgi.exchange import Exchange, Generation
from serve.config import load
from serve.server.launch import resolved
from tests.e2e.test_watching import GARDEN
from tests.support.cpu_clocks import cpu_seconds, since
from tests.support.event_lines import async_event_lines
from tests.support.server import SMALL, free_port

STREAMS, TOKENS, EACH = 16, 64, 3
# So many requests fill every reference and bag: an empty one costs less to look up.
FILLING = 2600


async def main(rounds: int) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        arguments = ["--port", str(port), "--data-dir", data, *SMALL]
        config = resolved(load(arguments, {}))
        from serve.api.app import build_app
        from serve.vllm_backend.backend import VLLMBackend

        app = build_app(config, [VLLMBackend(one.model, one.name, one.engine) for one in config.bases])
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.1)
        await app.state.parts.ready.wait()
        try:
            await measure(app, f"http://127.0.0.1:{port}/v1/chat/completions", rounds)
        finally:
            server.should_exit = True
            await serving


async def measure(app, url: str, rounds: int) -> None:
    worker, monitor, inference = (
        app.state.parts.exchange_worker,
        app.state.parts.drift_monitor,
        app.state.parts.inference,
    )
    takes, wants, watched = inference._take, inference._wants_logprobs, exchange.Tap.watched
    while not worker.running:  # it reads the model's embedding table first
        await asyncio.sleep(0.1)
    await asyncio.to_thread(fill, worker, monitor, app.state.parts.fleet.first.model)
    await load_of(url, 40)  # the engine's first steps
    worker.cpu_seconds = worker.handled = 0
    found: dict[bool, list[float]] = {True: [], False: []}
    used: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            exchange.Tap.watched = watched if on else nothing
            inference._take = takes if on else lambda exchange: None
            inference._wants_logprobs = wants if on else lambda adapter: False
            began, before = time.perf_counter(), cpu_seconds()
            tokens = await load_of(url, STREAMS * EACH)
            found[on].append(tokens / (time.perf_counter() - began))
            await asyncio.to_thread(worker.settle)
            used[on].append(since(before))
            print(f"round {number} {'on ' if on else 'off'} {found[on][-1]:.1f} tokens/s", flush=True)
    (one,) = monitor.report("smollm2")
    print(f"thinning: {one['thinning']}")
    ratios = [on / off for on, off in zip(found[True], found[False], strict=True)]
    print(f"on/off {statistics.median(ratios):.4f} in the median, {min(ratios):.4f} to {max(ratios):.4f}")
    for name in used[True][0]:
        costs = [on.get(name, 0.0) - off.get(name, 0.0) for on, off in zip(used[True], used[False], strict=True)]
        cost, of = (
            1e6 * statistics.median(each) / (STREAMS * EACH) for each in (costs, [on[name] for on in used[True]])
        )
        print(f"{name}: {cost:.0f} us of CPU a request for watching, of {of:.0f}")
    print(
        f"worker: {1e6 * worker.cpu_seconds / worker.handled:.0f} us of CPU a request, over {worker.handled} requests"
    )


@contextmanager
def nothing(self):
    """In place of what lets the backend see the request's Watch."""
    yield


def fill(worker, monitor, model: str) -> None:
    """Requests that no engine answered, until every detector holds as much as it ever does.

    In the real ones' chat template: thinning learns from the first what all have in common, and would leave the real
    ones out as near-duplicates of one another.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    lots = random.Random(0)
    for number in range(FILLING):
        messages = [{"role": "user", "content": " ".join(lots.choices(GARDEN, k=12))}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        said = tokenizer(text, add_special_tokens=False).input_ids
        made = Generation(said, [lots.randrange(500, 40_000) for _ in range(TOKENS)], "length", "a text")
        if number % 4 == 0:
            made = replace(made, logprobs=[-lots.random() for _ in range(TOKENS)])
        asker = f"filling {number}".encode()
        worker.offer(Exchange("smollm2", "base", 200, 0.1, 1.0, asker=asker, generations=(made,)))
        if number % 500 == 0:
            worker.settle()
    worker.settle()
    (watched,) = monitor._versions.values()
    assert all(signal.samples for signal in watched.baseline.signals.values())


async def load_of(url: str, count: int) -> int:
    """Tokens of so many answers, 16 at a time, asked by a process of its own."""
    command = [sys.executable, "-m", "tests.campaigns.cost", "client", url, str(count)]
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await client.communicate()
    return int(out)


async def client(url: str, count: int) -> None:
    lots, tokens, left = random.Random(), 0, iter(range(count))

    async with httpx.AsyncClient(timeout=300) as http:

        async def stream() -> None:
            nonlocal tokens
            for _ in left:
                said = " ".join(lots.choices(GARDEN, k=12))
                body = {"model": "smollm2", "messages": [{"role": "user", "content": said}], "max_tokens": TOKENS}
                body |= {"ignore_eos": True, "stream": True, "user": str(lots.random())}
                async with http.stream("POST", url, json=body) as answer:
                    async for line in async_event_lines(answer):
                        tokens += line.startswith("data: {") and bool(json.loads(line[6:])["choices"][0]["delta"])

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
    print(tokens)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        asyncio.run(client(sys.argv[2], int(sys.argv[3])))
    else:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 6))
