"""What OpenTelemetry costs: one real server, whose tracing goes on and off from round to round, under 16 streams.

    python -m tests.campaigns.tracing_cost [--rounds N] [--each N]

Traces, metrics and events go to a collector in a process of its own. Rounds come in pairs, on and off in turns. Prints
tokens a second, the mean time of an answer and the CPU time of the server's process a request, on against off, with a
95 % interval over the pairs; and how many spans the collector got of how many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from serve.config import load
from serve.server.launch import resolved
from tests.support.collector import Collector
from tests.support.event_lines import async_event_lines
from tests.support.server import SMALL, free_port

STREAMS, TOKENS = 16, 64
WORDS = "garden river stone winter letter window music harbour orange silver mountain candle"


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens a second, mean seconds of an answer, and CPU seconds of the server's process a request."""

    tokens: float
    answer: float
    cpu: float


async def main(rounds: int, each: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Collector(Path(folder)) as collector:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        port = free_port()
        arguments = ["--port", str(port), "--data-dir", f"{folder}/data", *SMALL]
        config = resolved(load(arguments))
        from serve.api.app import build_app
        from serve.vllm_backend.backend import VLLMBackend

        app = build_app(config, [VLLMBackend(base.model, base.name, base.engine) for base in config.bases])
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.1)
        await app.state.parts.ready.wait()
        try:
            await measure(app, f"http://127.0.0.1:{port}/v1/chat/completions", rounds, each)
        finally:
            server.should_exit = True
            await serving
        sent = rounds * STREAMS * each
        requests = [span for span in collector.spans() if span["name"].startswith("chat ")]
        print(f"spans: {len(requests)} of {sent} requests, {len(collector.spans())} in all")


async def measure(app: Any, url: str, rounds: int, each: int) -> None:
    parts = app.state.parts
    begin = parts.inference._traced
    parts.inference._traced = None
    await load_of(url, STREAMS * each)  # the engine's first steps
    results: dict[bool, list[Round]] = {True: [], False: []}
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            parts.inference._traced = begin if on else None
            cpu, began = time.process_time(), time.perf_counter()
            tokens, answer = await load_of(url, STREAMS * each)
            seconds = time.perf_counter() - began
            results[on].append(Round(tokens / seconds, answer, (time.process_time() - cpu) / (STREAMS * each)))
            print(f"round {number} {'on ' if on else 'off'} {results[on][-1]}", flush=True)
    for name in ("tokens", "answer", "cpu"):
        ratios = [getattr(a, name) / getattr(b, name) for a, b in zip(results[True], results[False], strict=True)]
        spread = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        print(f"{name}: on/off {statistics.mean(ratios):.4f} +- {spread:.4f}, median {statistics.median(ratios):.4f}")
    worker = parts.tracing._worker
    await asyncio.to_thread(worker.settle)
    print(f"building spans: {1e6 * worker.cpu_seconds / max(1, worker.handled):.0f} us of CPU a request")


async def load_of(url: str, count: int) -> tuple[int, float]:
    """Tokens of so many answers and the mean seconds of one, 16 at a time, asked by a process of its own."""
    command = [sys.executable, "-m", "tests.campaigns.tracing_cost", "--client", url, "--count", str(count)]
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await client.communicate()
    said = json.loads(out)
    return said["tokens"], said["answer"]


async def client(url: str, count: int) -> None:
    lots, tokens, seconds, left = random.Random(0), 0, [], iter(range(count))

    async with httpx.AsyncClient(timeout=300) as http:

        async def stream() -> None:
            nonlocal tokens
            for _ in left:
                asked = " ".join(lots.choices(WORDS.split(), k=12))
                body = {"model": "smollm2", "messages": [{"role": "user", "content": asked}], "max_tokens": TOKENS}
                began = time.perf_counter()
                async with http.stream("POST", url, json={**body, "ignore_eos": True, "stream": True}) as answer:
                    async for line in async_event_lines(answer):
                        tokens += line.startswith("data: {") and bool(json.loads(line[6:])["choices"][0]["delta"])
                seconds.append(time.perf_counter() - began)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))
    print(json.dumps({"tokens": tokens, "answer": statistics.mean(seconds)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of rounds")
    parser.add_argument("--each", type=int, default=3, help="answers of each stream in a round")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        asyncio.run(client(asked.client, asked.count))
    else:
        asyncio.run(main(asked.rounds, asked.each))
