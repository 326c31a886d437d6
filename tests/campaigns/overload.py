"""What a server does with four times the load that it can sustain: goodput, and how soon the rest is turned away.

    python -m tests.campaigns.overload [SECONDS]

Starts the real server, finds the rate of answers that a closed crowd gets (the best of three times, or a moment's
disturbance would make every load look small), then offers 1, 4, 1.5, 4 and 1 times that rate for SECONDS each, by
arrivals that wait for nobody (Poisson). Goodput is answers within the objective, a second: whole within `SLO` seconds
of the request; its peak is the best of all these loads. It is counted once a load has lasted `RISE` seconds. A request
that gets 429 counts as turned away, and how long that took is told. Client and server share the machine.

Where Debian's Prometheus is installed, it runs beside the server on the shipped rules: how soon after the beginning of
a load the alert for the queue fires and whom it names, and how soon after the beginning of the next one it ends, is
told too.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve.client.bench.wire import Address, Connection, WireError
from tests.support.prometheus import HAS_PROMETHEUS, ask, prometheus
from tests.support.server import BASE, SMALL, Server

TOKENS = 32
SLO = 12.0
# Fewer than the engine has seats for one tenant: nobody of the crowd is turned away.
CROWD = 24
MAX_WAIT = "4"
LOADS = (1, 4, 1.5, 4, 1)
RISE = 5.0
ALERT = 'ALERTS{alertname="LoradockQueue",alertstate="firing"}'


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    seconds: float
    ended: float


class Client:
    """Many requests at once, each on a connection of its own while it lasts; it costs less than what it measures."""

    def __init__(self, url: str) -> None:
        self._address = Address(url)
        self._idle: list[Connection] = []

    async def ask(self) -> Outcome:
        prompt = f"Story {random.randrange(1 << 30)}:"
        body = {"model": BASE, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        request = self._address.post("/v1/completions", json.dumps(body).encode())
        began = time.perf_counter()
        try:
            while self._idle and not self._idle[-1].reusable:
                self._idle.pop()
            connection = self._idle.pop() if self._idle else await self._address.connect()
            status = (await connection.exchange(request)).status
        except WireError:
            return Outcome(0, time.perf_counter() - began, time.perf_counter())
        if connection.reusable:
            self._idle.append(connection)
        return Outcome(status, time.perf_counter() - began, time.perf_counter())

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


async def closed(client: Client, seconds: float) -> float:
    """Answers a second that a crowd of fixed size gets."""
    end, count = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal count
        while time.perf_counter() < end:
            answer = await client.ask()
            count += answer.status == 200

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CROWD)))
    return count / (time.perf_counter() - began)


async def offered(client: Client, rate: float, seconds: float) -> list[Outcome]:
    """What became of arrivals at this rate, as far as it came out after `RISE` and before the time was over."""
    began, tasks = time.perf_counter(), []
    while (now := time.perf_counter() - began) < seconds:
        while len(tasks) < now * rate:
            tasks.append(asyncio.create_task(client.ask()))
        await asyncio.sleep(random.expovariate(rate))
    return [one for one in await asyncio.gather(*tasks) if began + RISE < one.ended <= began + seconds]


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


class QueueAlert:
    """Tells when the alert for the queue begins to fire and when it ends, and how long after the load changed."""

    def __init__(self, watching: httpx.Client | None) -> None:
        self._watching, self._load, self._since = watching, "", time.monotonic()
        self.firing = False

    def load(self, load: str) -> None:
        """The load is another one from now on."""
        self._load, self._since = load, time.monotonic()

    async def look(self) -> None:
        """Until it is cancelled."""
        while self._watching:
            alerts = await asyncio.to_thread(ask, self._watching, ALERT)
            if bool(alerts) is not self.firing:
                self.firing = bool(alerts)
                names = sorted({f"{one['metric']['adapter']} of {one['metric']['tenant']}" for one in alerts})
                print(f"{self._load}: the alert {'fires, for ' + ', '.join(names) if alerts else 'has ended'}, "
                      f"after {time.monotonic() - self._since:.0f} s", flush=True)  # fmt: skip
            await asyncio.sleep(1)

    async def ended(self, seconds: float = 300.0) -> None:
        """Wait until it no longer fires, and say so where it goes on."""
        began = time.monotonic()
        while self.firing and time.monotonic() - began < seconds:
            await asyncio.sleep(1)
        if self.firing:
            print(f"{self._load}: the alert still fires after {time.monotonic() - self._since:.0f} s", flush=True)


async def measure(url: str, seconds: float, watching: httpx.Client | None) -> None:
    client, alert = Client(url), QueueAlert(watching)
    looking = asyncio.create_task(alert.look())
    try:
        await closed(client, seconds / 4)
        rates = [await closed(client, seconds / 4) for _ in range(3)]
        rate = max(rates)
        each = ", ".join(f"{one:.2f}" for one in rates)
        print(f"a crowd of {CROWD} gets {rate:.2f} answers of {TOKENS} tokens a second ({each})", flush=True)
        good: dict[float, list[float]] = {times: [] for times in LOADS}
        for times in LOADS:
            alert.load(f"{times} x")
            found = await offered(client, times * rate, RISE + seconds)
            good[times].append(told(f"{times} x", found, seconds))
            await closed(client, 2)  # until those that were still waiting have been answered
        alert.load("no load")
        await alert.ended()
        peak = max(max(each) for each in good.values())
        worst, best = sorted(good[4])
        print(
            f"goodput at 4 x is {worst / peak:.0%} and {best / peak:.0%} of its peak, {peak:.2f} a second "
            f"({worst / rate:.0%} and {best / rate:.0%} of what the crowd gets)"
        )
    finally:
        if looking.done():
            looking.result()
        looking.cancel()
        client.close()


def main(seconds: float = 60.0) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "monitoring").mkdir()
    with Server(folder / "data", folder / "log", "--max-wait", MAX_WAIT, *SMALL) as server:
        beside = prometheus(folder / "monitoring", server.port, "none") if HAS_PROMETHEUS else nullcontext()
        with beside as watching:
            asyncio.run(measure(server.url, seconds, watching))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
