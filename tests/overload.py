"""What a server does with four times the load that it can sustain: goodput, and how soon the rest is turned away.

    python -m tests.overload [SECONDS]

Starts the real server, finds the rate of answers that a closed crowd gets, then offers 1 and 4 times that rate for
SECONDS each, by arrivals that wait for nobody (Poisson). Goodput is answers within the objective, a second: whole
within `SLO` seconds. A request that gets 429 counts as turned away, and how long that took is told.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.server import BASE, SMALL, Server

TOKENS = 32
SLO = 12.0
CROWD = 32
MAX_WAIT = "4"


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    seconds: float
    ended: float


async def ask(http: httpx.AsyncClient, number: int) -> Outcome:
    body = {"model": BASE, "prompt": f"Story {number}:", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    try:
        status = (await http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "60"})).status_code
    except httpx.TransportError:
        status = 0
    return Outcome(status, time.perf_counter() - began, time.perf_counter())


async def closed(http: httpx.AsyncClient, seconds: float) -> float:
    """Answers a second that a crowd of fixed size gets."""
    end, count = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal count
        while time.perf_counter() < end:
            count += (await ask(http, random.randrange(1 << 30))).status == 200

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CROWD)))
    return count / (time.perf_counter() - began)


async def offered(http: httpx.AsyncClient, rate: float, seconds: float) -> list[Outcome]:
    """What became of arrivals at this rate, as far as it was known when the time was over."""
    began, tasks = time.perf_counter(), []
    while (now := time.perf_counter() - began) < seconds:
        while len(tasks) < now * rate:
            tasks.append(asyncio.create_task(ask(http, random.randrange(1 << 30))))
        await asyncio.sleep(random.expovariate(rate))
    return [one for one in await asyncio.gather(*tasks) if one.ended <= began + seconds]


def told(name: str, outcomes: list[Outcome], seconds: float) -> float:
    good = sum(one.status == 200 and one.seconds <= SLO for one in outcomes) / seconds
    away = sorted(one.seconds * 1000 for one in outcomes if one.status == 429)
    late = sum(one.status == 200 and one.seconds > SLO for one in outcomes)
    other = [one.status for one in outcomes if one.status not in (200, 429)]
    line = (
        f"{name}: {len(outcomes) / seconds:.2f} offered, {good:.2f} good a second, {late} late, {len(away)} times 429"
    )
    if away:
        line += f" in {statistics.median(away):.0f} ms (median), {away[int(len(away) * 0.99)]:.0f} ms (p99)"
    print(line + (f", others {other}" if other else ""), flush=True)
    return good


async def measure(url: str, seconds: float) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await closed(http, seconds / 4)
        rate = await closed(http, seconds / 2)
        print(f"a crowd of {CROWD} gets {rate:.2f} answers of {TOKENS} tokens a second", flush=True)
        once = told("1 x", await offered(http, rate, seconds), seconds)
        four = told("4 x", await offered(http, 4 * rate, seconds), seconds)
        print(f"goodput at 4 x is {four / max(once, rate):.0%} of its peak")


def main(seconds: float = 60.0) -> None:
    folder = Path(tempfile.mkdtemp())
    with Server(folder / "data", folder / "log", "--max-wait", MAX_WAIT, *SMALL) as server:
        asyncio.run(measure(server.url, seconds))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
