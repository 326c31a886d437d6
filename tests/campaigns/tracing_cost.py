"""What OpenTelemetry costs: one real server under 16 streams, whose tracing goes on and off in turns of some seconds.

    python -m tests.campaigns.tracing_cost [--minutes N] [--spell SECONDS] [--settle SECONDS]

Traces, metrics and events go to a collector in a process of its own, which decodes nothing. The streams never pause,
and the first seconds of each spell do not count: answers that began before it end in them, and their spans are sent.
Prints how much longer an answer takes with tracing, and how much more CPU time of the server's process a token, with
95 % intervals over the pairs of spells; the CPU time of tracing's own threads; and whether every trace was delivered.
The exit code is 1 while an answer may be more than 1 % slower.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.config import load
from serve.server.launch import resolved
from tests.campaigns.paired_spells import FEWEST, compared, order
from tests.support.collector import Collector
from tests.support.event_lines import async_event_lines
from tests.support.in_process_server import in_process, run
from tests.support.server import SMALL, free_port

STREAMS = 16
# Of one length: as many prompts fall into each spell. Each stream's first answer has another length, so that they do
# not go in step.
TOKENS = 64
WORDS = "garden river stone winter letter window music harbour orange silver mountain candle"
# What is to be shown, and how wide the interval may be: beside other work it means nothing, whatever it says.
MOST, WIDTH = 1.01, 0.02
# Spans go within this time, not within OpenTelemetry's 5 s: what a spell causes is paid in it, with more exports.
DELAY_MS = "2000"


@dataclass(slots=True)
class Spell:
    """From `began` to `ended` (time.monotonic) that many tokens came; CPU seconds of the server's process."""

    on: bool
    began: float
    ended: float
    cpu: float
    tokens: int = 0

    @property
    def seconds_a_token(self) -> float:
        """Of all streams together. As they never pause, an answer takes longer by as much."""
        return (self.ended - self.began) / self.tokens

    @property
    def cpu_a_token(self) -> float:
        return self.cpu / self.tokens


async def main(minutes: float, spell: float, settle: float) -> int:
    with tempfile.TemporaryDirectory() as folder, Collector(Path(folder)) as collector:
        collector.behave(keep=False)
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", DELAY_MS)
        port = free_port()
        config = resolved(load(["--port", str(port), "--data-dir", f"{folder}/data", *SMALL]))
        async with in_process(config, port) as parts:
            pairs = max(FEWEST, round(60 * minutes / (2 * (settle + spell))))
            spells = await measured(parts, f"http://127.0.0.1:{port}/v1/chat/completions", pairs, spell, settle)
            await asyncio.to_thread(parts.tracing.settle)
            return told(spells, parts.tracing)


async def measured(parts: Any, url: str, pairs: int, seconds: float, settle: float) -> list[Spell]:
    """The spells, with what came in them, while a process of its own keeps 16 streams going."""
    tracing, spells = parts.inference._tracing, []
    parts.inference._tracing = None
    command = [sys.executable, "-m", "tests.campaigns.tracing_cost", "--client", url]
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 28)
    assert client.stdin and client.stdout
    assert await client.stdout.readline(), "the clients failed"  # else every stream has had an answer
    for on in order(pairs):
        parts.inference._tracing = tracing if on else None
        await asyncio.sleep(settle)
        began, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        spells.append(Spell(on, began, time.monotonic(), time.process_time() - cpu))
    parts.inference._tracing = None
    came = json.loads((await client.communicate(b"\n"))[0])
    assert client.returncode == 0, "the clients failed"
    for spell in spells:
        spell.tokens = bisect_left(came, spell.ended) - bisect_left(came, spell.began)
    return spells


def told(spells: Sequence[Spell], tracing: Any) -> int:
    slower, cpu = compared(spells, lambda one: one.seconds_a_token), compared(spells, lambda one: one.cpu_a_token)
    off = [spell for spell in spells if not spell.on]
    rate = sum(spell.tokens for spell in off) / sum(spell.ended - spell.began for spell in off)
    print(f"{slower.pairs} pairs of spells, {rate:.0f} tokens/s without tracing")
    print(f"an answer takes longer by {slower}")
    print(f"CPU time of the server's process a token is more by {cpu}")
    worker, queue = tracing._worker, tracing._traces
    count = max(1, worker.handled)
    built = worker.cpu_seconds / count
    sent = time.clock_gettime(time.pthread_getcpuclockid(queue._thread.ident)) / count
    share = (built + sent) * rate / TOKENS
    print(f"tracing's threads: {1e6 * built:.0f} us a request to build its spans, {1e6 * sent:.0f} us to send them: "
          f"{100 * share:.2f} % of one core")  # fmt: skip
    lost = queue.dropped + worker.dropped
    print(f"traces: {worker.handled}, {queue.delivered} delivered, {queue.waiting} wait, {lost} lost")
    shown = slower.high <= MOST and slower.high - slower.low <= WIDTH
    print("at most 1 % slower: " + ("shown" if shown else "not shown; give it more minutes, on a quiet machine"))
    return int(not shown or lost > 0)


async def client(url: str) -> None:
    """Stream until a line comes; then print when each token came."""
    came: list[float] = []
    stop = asyncio.Event()

    async def stream(http: httpx.AsyncClient, number: int, first: asyncio.Event) -> None:
        lots = random.Random(number)
        while not stop.is_set():
            tokens = TOKENS if first.is_set() else TOKENS * (number + 1) // STREAMS
            asked = " ".join(lots.choices(WORDS.split(), k=12))
            body = {"model": "smollm2", "messages": [{"role": "user", "content": asked}], "ignore_eos": True}
            body |= {"max_tokens": tokens, "stream": True}
            async with http.stream("POST", url, json=body) as answer:
                answer.raise_for_status()
                times = [time.monotonic() async for line in async_event_lines(answer) if line.startswith("data: {")]
            came.extend(times[1:])  # the first event says whose turn it is
            first.set()

    firsts = [asyncio.Event() for _ in range(STREAMS)]
    async with httpx.AsyncClient(timeout=300) as http, asyncio.TaskGroup() as streams:
        for number, first in enumerate(firsts):
            streams.create_task(stream(http, number, first))
        await asyncio.gather(*(first.wait() for first in firsts))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        stop.set()
    print(json.dumps(sorted(came)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="of measuring")
    parser.add_argument("--spell", type=float, default=8, help="seconds that count of a spell")
    parser.add_argument("--settle", type=float, default=5, help="seconds before them that do not")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        asyncio.run(client(asked.client))
    else:
        raise SystemExit(run(main(asked.minutes, asked.spell, asked.settle)))
