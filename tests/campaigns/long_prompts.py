"""How long running answers wait for a token beside long prompts, and those for theirs, by `--target-inter-token`.

    python -m tests.campaigns.long_prompts [--targets auto 0 0.25 0.1] [--against DIR] [--rate 2] [--seconds 12]
        [--rounds 2] [--length 1024] [--streams 16] [--weights auto]

One server after another, one for each target, forwards and backwards; with `--against`, one more of another checkout
of loradock with its own default. In a round, streams answer without a pause; after some seconds alone, long prompts
come at a steady rate. Client and server share the machine. Two rounds of five servers take 7 minutes and 3 GB.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.support.event_lines import async_event_lines
from tests.support.server import BASE, ROOT, Server

WARM, QUIET = 2.0, 6.0
# What this is to be: the first target's waits against those without prompts, and its first tokens against before.
SLOWER, LATER = 3.0, 1.3


@dataclass
class Waits:
    """Seconds."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def slower(self) -> float:
        """How many times as long as alone 99 of 100 tokens take at most."""
        return float(np.percentile(self.beside, 99) / np.percentile(self.alone, 99))

    def row(self) -> str:
        def p(values: Sequence[float], q: float) -> str:
            return f"{1000 * np.percentile(values, q):,.0f}"

        gaps = " | ".join(p(self.alone, q) for q in (50, 99, 100)) + " | "
        gaps += " | ".join(p(self.beside, q) for q in (50, 99, 100))
        first = f"{p(self.prompts, 50)} | {p(self.prompts, 90)}"
        return f"{gaps} | {self.slower:.1f} | {first} | {self.tokens / self.seconds:.0f} | {len(self.prompts)}"


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


async def _round(url: str, waits: Waits, chosen: argparse.Namespace) -> None:
    rng = random.Random(len(waits.prompts))

    def words(count: int) -> str:
        return " ".join(rng.choice(("river", "stone", "cloud", "tree", "house", "road")) for _ in range(count))

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        warm = time.monotonic() + WARM
        begins = warm + QUIET
        ends = begins + chosen.seconds

        async def answered() -> None:
            while time.monotonic() < ends:
                times = await _stream(http, words(30), 64)
                for before, now in itertools.pairwise(times):
                    if begins <= before < ends:
                        waits.beside.append(now - before)
                    elif warm <= before and now < begins:
                        waits.alone.append(now - before)
                waits.tokens += sum(begins <= at < ends for at in times)

        async def asked() -> None:
            start = time.monotonic()
            waits.prompts.append((await _stream(http, words(chosen.length), 1))[0] - start)

        running = [asyncio.create_task(answered()) for _ in range(chosen.streams)]
        await asyncio.sleep(WARM + QUIET)
        prompts = []
        while time.monotonic() < ends:
            prompts.append(asyncio.create_task(asked()))
            await asyncio.sleep(1 / chosen.rate)
        await asyncio.gather(*running, *prompts)
        waits.seconds += chosen.seconds


def _server(folder: Path, chosen: argparse.Namespace, root: Path, *more: str) -> Server:
    words = ("--max-model-len", "4096", "--kv-cache-memory-bytes", "1G", "--cpu-weights", chosen.weights)
    return Server(folder / "data", folder / "log", *words, *more, root=root)


def main() -> None:
    parser = argparse.ArgumentParser(description="long prompts beside running answers")
    parser.add_argument("--targets", nargs="+", default=["auto", "0", "0.25", "0.1"])
    parser.add_argument("--against", type=Path, help="another checkout of loradock, measured beside this one")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="words in a long prompt, one token each")
    parser.add_argument("--rate", type=float, default=2, help="long prompts a second")
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", default="auto", help="--cpu-weights of the servers")
    chosen = parser.parse_args()
    servers: dict[str, tuple[Any, ...]] = {target: (ROOT, "--target-inter-token", target) for target in chosen.targets}
    if chosen.against:
        servers["before"] = (chosen.against.resolve(),)
    waits = {target: Waits() for target in servers}
    for number in range(chosen.rounds):
        for target in list(servers)[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder, _server(Path(folder), chosen, *servers[target]) as server:
                asyncio.run(_round(server.url, waits[target], chosen))
    gaps = "between tokens alone, p50, p99, max ms | | | beside prompts | | | times p99 alone"
    print(f"| target, s | {gaps} | first token of a prompt, p50, p90 | | tokens/s | prompts |")
    print("|---" * 12 + "|")
    for target, seen in waits.items():
        print(f"| {target} | {seen.row()} |", flush=True)
    first = waits[chosen.targets[0]]
    print(f"p99 between tokens is {first.slower:.2f} times that of alone (wanted: {SLOWER} at most)")
    if chosen.against:
        later = [np.percentile(first.prompts, q) / np.percentile(waits["before"].prompts, q) for q in (50, 90)]
        print(f"first tokens take {later[0]:.2f} (p50), {later[1]:.2f} (p90) of before (wanted: {LATER} at most)")


if __name__ == "__main__":
    main()
