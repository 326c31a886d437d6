"""How long running answers wait for a token beside long prompts, and those for theirs, by `--target-inter-token`.

    python -m tests.campaigns.long_prompts [--targets 0 0.25 0.1] [--rate 0.5] [--seconds 20] [--rounds 2]

One server for each target, all up, one asked at a time, forwards and backwards. In a round, streams answer without a
pause; after some seconds alone, prompts of some thousand tokens come at a steady rate. Client and servers share the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from tests.support.event_lines import async_event_lines
from tests.support.server import BASE, SMALL, Server

QUIET = 6.0


@dataclass
class Waits:
    """Seconds."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def row(self) -> str:
        def p(values: Sequence[float], q: float) -> str:
            return f"{1000 * np.percentile(values, q):,.0f}"

        gaps = " | ".join(p(self.alone, q) for q in (50, 99, 100)) + " | "
        gaps += " | ".join(p(self.beside, q) for q in (50, 99, 100))
        first = f"{p(self.prompts, 50)} | {p(self.prompts, 90)}"
        return f"{gaps} | {first} | {self.tokens / self.seconds:.0f} | {len(self.prompts)}"


async def _stream(http: httpx.AsyncClient, prompt: str, tokens: int) -> list[float]:
    """When each token came."""
    body = {"model": BASE, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    times = []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in async_event_lines(answer):
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.monotonic())
    return times


async def _round(url: str, waits: Waits, streams: int, length: int, rate: float, seconds: float) -> None:
    rng = random.Random(len(waits.prompts))

    def words(count: int) -> str:
        return " ".join(rng.choice(("river", "stone", "cloud", "tree", "house", "road")) for _ in range(count))

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        begins = time.monotonic() + QUIET
        ends = begins + seconds

        async def answered() -> None:
            while time.monotonic() < ends:
                times = await _stream(http, words(30), 64)
                for before, now in itertools.pairwise(times):
                    if before >= begins:
                        waits.beside.append(now - before)
                    elif now < begins:
                        waits.alone.append(now - before)
                waits.tokens += sum(begins <= at < ends for at in times)

        async def asked() -> None:
            start = time.monotonic()
            waits.prompts.append((await _stream(http, words(length), 1))[0] - start)

        running = [asyncio.create_task(answered()) for _ in range(streams)]
        await asyncio.sleep(QUIET)
        prompts = []
        while time.monotonic() < ends:
            prompts.append(asyncio.create_task(asked()))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*running, *prompts)
        waits.seconds += seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="long prompts beside running answers")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.0, 0.25, 0.1])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--length", type=int, default=1800, help="words in a long prompt, one token each")
    parser.add_argument("--rate", type=float, default=0.3, help="long prompts a second")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    waits = {target: Waits() for target in chosen.targets}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as up:
        servers = {
            target: up.enter_context(
                Server(
                    Path(folder, str(target)),
                    Path(folder, f"{target}.log"),
                    *SMALL,
                    "--target-inter-token",
                    str(target),
                )
            )
            for target in chosen.targets
        }
        for number in range(chosen.rounds):
            order = chosen.targets if number % 2 == 0 else chosen.targets[::-1]
            for target in order:
                asyncio.run(
                    _round(
                        servers[target].url, waits[target], chosen.streams, chosen.length, chosen.rate, chosen.seconds
                    )
                )
    gaps = "between tokens alone, p50, p99, max ms | | | beside prompts | | "
    print(f"| target, s | {gaps} | first token of a prompt, p50, p90 | | tokens/s | prompts |")
    print("|---" * 11 + "|")
    for target, seen in waits.items():
        print(f"| {target:g} | {seen.row()} |", flush=True)


if __name__ == "__main__":
    main()
