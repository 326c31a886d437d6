"""`make fleet-ray`: two replicas on Ray, 64 adapters and room for 8 on each: homes beside Ray's own router.

Two clusters stand beside one another on this machine, and answer the same requests in turns: a spell with homes, and
one with Ray's default (the one with less to do of two). Counted are adapters that were loaded, and the time to the
first token, as clients saw it. Then what the proxy's middleware costs: turned on and off in one proxy, in processor
time of all processes a token, and alone. At last the simulation (`tests.campaigns.fleet_sim`) is given the same
requests, with the times of these engines, which are measured before, and with how long each engine waited for a
processor while it answered them. With `--paced` engines take so much longer for everything than they compute that two
of them do not wait for one processor, and the simulation is given these times: nothing of it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from serve.server.ray_proxy import CALLBACK, ModelHeader
from tests.campaigns.fleet_load import Load, Request, requests_of
from tests.campaigns.fleet_service_times import SHORT, WORD, first_seconds, service_of, streamed
from tests.campaigns.fleet_sim import Server as Simulated
from tests.campaigns.fleet_sim import Service, Simulation
from tests.campaigns.paired_spells import compared, order
from tests.support import switched_middleware
from tests.support.lora import WORDS, trained, variant
from tests.support.paced import Paces
from tests.support.run_delay import Watched, watching
from tests.support.server import BASE, Server, descendants, done, listens
from tests.support.waiting import eventually

HOMES, DEFAULT = "homes", "Ray's default"
POLICY = {HOMES: "homes", DEFAULT: "power of two"}
FLAGS = ("--ray", "--replicas", "2", "--no-drift", "--no-probe", "--max-model-len", "2048")
FLAGS += ("--kv-cache-memory-bytes", "512M", "--restart-wait", "300", "--max-wait", "300")
# Both replicas share one processor's two threads. What else runs on this machine takes none of them its memory.
ENVIRON = {"OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
# More than they really take here, both at once.
PACES = Paces(step=0.12, step_per_answer=0.004, prompt_token=0.003, load=0.4)
# Between two spells, until what was asked is answered everywhere.
PAUSE_SECONDS = 2.0
# How often the simulation draws anew.
DRAWS = 8
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Spell:
    """What one spell of requests saw."""

    on: bool
    firsts: Sequence[float]
    cold: int
    failed: Sequence[str]
    # By `time.perf_counter`.
    began: float = 0.0

    @property
    def p99(self) -> float:
        return float(np.percentile(self.firsts, 99))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.firsts)


@dataclass
class Cluster:
    """Two replicas of one router. `off`: a file that turns the middleware off while it is there."""

    name: str
    server: Server
    off: Path
    ids: list[str] = field(default_factory=list)
    # The engine of each replica.
    engines: list[Watched] = field(default_factory=list)

    @property
    def replicas(self) -> list[str]:
        """Where each replica answers alone."""
        return [f"http://127.0.0.1:{self.server.port + number}" for number in (1, 2)]

    def loads(self) -> int:
        """Adapters that were brought into an engine, since it started."""
        return sum(int(_sample(url, 'loradock_adapter_load_seconds_count{tier="disk"}')) for url in self.replicas)

    def forwarded(self) -> int:
        return sum(int(_sample(url, "loradock_forwarded_requests_total")) for url in self.replicas)

    def cpu(self) -> dict[int, float]:
        """Processor seconds of each of its processes."""
        found = {}
        for pid in {self.server.process.pid, *descendants(self.server.process.pid)}:
            try:
                parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[pid] = (int(parts[11]) + int(parts[12])) / TICKS
        return found

    def proxies(self) -> set[int]:
        """Process ids of Ray's proxies."""
        return {pid for pid in descendants(self.server.process.pid) if b"ProxyActor" in _command(pid)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _engine_of(cluster: Cluster, url: str) -> list[int]:
    """The processes below the one that answers there."""
    port = int(url.rpartition(":")[2])
    replica = next(pid for pid in descendants(cluster.server.process.pid) if listens(pid, port))
    return [*descendants(replica)]


def _sample(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def clusters(stack: ExitStack, work: Path, adapters: int, slots: int, paces: Paces | None = None) -> dict[str, Cluster]:
    """Both, with these adapters; their engines as slow as `paces` says."""
    paced = paces.environ(work / "paced") if paces else {}
    alpha = trained(*WORDS)[WORDS[0]]
    folders = [variant(alpha, work / f"adapter-{number}", scale=1 - number / 1000) for number in range(adapters)]
    made = {}
    for name in (HOMES, DEFAULT):
        place = work / name.replace(" ", "-").replace("'", "")
        place.mkdir()
        off = place / "off"
        flags = (*FLAGS, "--max-loras", str(slots), "--max-cpu-loras", str(slots))
        flags += ("--fleet", "homes" if name == HOMES else "off")
        # Only homes read names in the proxy.
        environ = {CALLBACK: switched_middleware.IMPORT_PATH, switched_middleware.VARIABLE: str(off)}
        environ = {**ENVIRON, **paced, **(environ if name == HOMES else {})}
        server = Server(place / "data", place / "log", *flags, **environ)
        stack.enter_context(server)
        cluster = made[name] = Cluster(name, server, off)
        assert eventually(lambda cluster=cluster: len(_ready(cluster)) == 2, 300), _ready(cluster)
        cluster.ids = [_me(url) for url in cluster.replicas]
        cluster.engines = [Watched(_engine_of(cluster, url)) for url in cluster.replicas]
        for number, folder in enumerate(folders):
            done(server.upload(f"adapter-{number}", folder))
    return made


def _ready(cluster: Cluster) -> list[str]:
    rows = done(cluster.server.http.get("/v1/replicas"))["data"]
    return [row["id"] for row in rows if row["phase"] == "ready"]


def _me(url: str) -> str:
    rows = done(httpx.get(f"{url}/v1/replicas", timeout=30))["data"]
    return str(next(row["id"] for row in rows if row["me"]))


# Requests


def traces(options: argparse.Namespace) -> list[list[Request]]:
    """The requests of each spell, whose times begin at 0: the simulation's own, slower and shorter."""
    made = []
    for seed in range(options.pairs + 1):
        load = Load(
            replicas=2, adapters=options.adapters, zipf=options.zipf, burst=options.burst, requests=options.requests,
            warm=0, seed=seed,
        )  # fmt: skip
        every, _, end = requests_of(load, 1.0)
        slower = options.requests / options.rate / end
        made.append(
            [
                replace(
                    one,
                    came=one.came * slower,
                    prompt=math.ceil(one.prompt * options.prompt / load.prompt),
                    answer=math.ceil(one.answer * options.answer / load.answer),
                )
                for one in every
            ]
        )
    return made


async def _asked(client: httpx.AsyncClient, request: Request, began: float) -> tuple[float, str]:
    """Seconds to its first token; what was wrong."""
    await asyncio.sleep(max(0.0, began + request.came - time.perf_counter()))
    body = {
        "model": request.name, "prompt": f"{random.randrange(10**5, 10**6)}" + WORD * max(request.prompt - 6, 1),
        "max_tokens": request.answer, "stream": True, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    first, asked, last = 0.0, time.perf_counter(), b""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for piece in answer.aiter_raw():
                first = first or time.perf_counter() - asked
                last = piece
            if answer.status_code != 200 or b"[DONE]" not in last:
                return first, f"{answer.status_code}: {last[:200]!r}"
    except httpx.HTTPError as error:
        return first, repr(error)
    return first, ""


async def _all_asked(url: str, requests: Sequence[Request]) -> list[tuple[float, str]]:
    """A prompt begins with six digits, each of them a token, which no other has."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        began = time.perf_counter()
        return await asyncio.gather(*(_asked(client, request, began) for request in requests))


def spell(cluster: Cluster, requests: Sequence[Request]) -> Spell:
    loads, began = cluster.loads(), time.perf_counter()
    ends = asyncio.run(_all_asked(cluster.server.url, requests))
    failed = [wrong for _, wrong in ends if wrong]
    firsts = [first for first, wrong in ends if not wrong]
    return Spell(cluster.name == HOMES, firsts, cluster.loads() - loads, failed, began)


def beside(both: dict[str, Cluster], every: Sequence[Sequence[Request]]) -> list[Spell]:
    """Every trace on both clusters, in turns; the first of them fills the replicas, and is not reported."""
    spells: list[Spell] = []
    turns = itertools.chain((True, False), order(len(every) - 1))
    for number, on in enumerate(turns):
        cluster = both[HOMES if on else DEFAULT]
        found = spell(cluster, every[number // 2])
        slow = statistics.fmean(engine.at(found.began + 10) for engine in cluster.engines)
        print(
            f"  {cluster.name:14} cold {found.cold:4} mean {found.mean:.4f} p99 {found.p99:.4f} slow {slow:.2f}",
            flush=True,
        )
        spells.append(found)
        time.sleep(PAUSE_SECONDS)
    return spells


def table(spells: Sequence[Spell]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, on in ((HOMES, True), (DEFAULT, False)):
        mine = [one for one in spells if one.on == on]
        firsts = [first for one in mine for first in one.firsts]
        p50, p95, p99 = (round(float(np.percentile(firsts, part)), 4) for part in (50, 95, 99))
        rows[name] = {
            "requests": len(firsts), "failed": sum(len(one.failed) for one in mine),
            "cold": sum(one.cold for one in mine), "p50": p50, "p95": p95, "p99": p99,
        }  # fmt: skip
    rows["paired"] = {
        "p99": str(compared(spells, lambda one: one.p99)),
        "mean": str(compared(spells, lambda one: one.mean)),
        "cold": str(compared(spells, lambda one: max(one.cold, 1))),
    }
    return rows


# What the middleware costs


@dataclass(frozen=True, slots=True)
class Cost:
    on: bool
    a_token: float
    proxy_a_request: float


def middleware_cost(cluster: Cluster, pairs: int, requests: int = 24) -> dict[str, Any]:
    """The base answers, so that names route nothing: processor time a token, with the middleware and without."""
    spells = []
    answer = 32
    every = [Request(0.02 * number, BASE, 160, answer) for number in range(requests)]
    for number, on in enumerate(order(pairs)):
        cluster.off.unlink(missing_ok=True)
        if not on:
            cluster.off.touch()
        proxies, before = cluster.proxies(), cluster.cpu()
        ends = asyncio.run(_all_asked(cluster.server.url, every))
        if wrong := [text for _, text in ends if text]:
            logs = [log.read_text(errors="replace")[-4000:] for log in cluster.server.data.glob("replica-*/log/*")]
            raise AssertionError("\n".join([*wrong[:3], *logs]))
        spent = {pid: seconds - before.get(pid, 0.0) for pid, seconds in cluster.cpu().items()}
        proxy = sum(spent.get(pid, 0.0) for pid in proxies)
        spells.append(Cost(on, sum(spent.values()) / (requests * answer), proxy / requests))
        if number == 0:
            spells.clear()  # the first one warms up
            spells.append(Cost(on, sum(spent.values()) / (requests * answer), proxy / requests))
    cluster.off.unlink(missing_ok=True)
    by = {on: [one for one in spells if one.on == on] for on in (True, False)}
    return {
        "processor ms a token with, without": [
            round(1000 * statistics.median(one.a_token for one in by[on]), 4) for on in (True, False)
        ],
        "paired": str(compared(spells, lambda one: one.a_token)),
        "proxy ms a request with, without": [
            round(1000 * statistics.median(one.proxy_a_request for one in by[on]), 3) for on in (True, False)
        ],
    }


def alone_cost(pairs: int = 40, requests: int = 500) -> dict[str, float]:
    """Microseconds of the middleware itself a request, by the processor time of this thread: with it, less without."""
    body = json.dumps({"model": "adapter-1", "messages": [{"role": "user", "content": WORD * 500}]}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions",
        "headers": [(b"host", b"x"), (b"content-type", b"application/json"), (b"authorization", b"Bearer key")],
    }  # fmt: skip

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        pass

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def run(asked: Any) -> float:
        began = time.thread_time()
        for _ in range(requests):
            await asked(dict(scope), receive, send)
        return (time.thread_time() - began) / requests

    async def paired() -> list[float]:
        return [await run(ModelHeader(app)) - await run(app) for _ in range(pairs)]

    found = asyncio.run(paired())
    return {"bytes of the body": len(body), "us a request": round(1e6 * statistics.median(found), 1)}


# The simulation, on the same requests


def service_times(stack: ExitStack, cluster: Cluster, adapters: int, slots: int) -> Service:
    """What its engines take; their bytes lie on this machine."""
    urls = [*cluster.replicas, cluster.server.url]
    one, other, door = (stack.enter_context(httpx.Client(base_url=url, timeout=120)) for url in urls)
    (engine,) = done(one.get("/v1/engines"))["data"]
    names = [f"adapter-{number}" for number in range(adapters)]
    return service_of(one, names, int(engine["seats"]), slots, 0.0, other, door, cluster.engines[0].pids)


def service_of_paces(stack: ExitStack, cluster: Cluster, paces: Paces, slots: int) -> Service:
    """The times that its engines were given. Measured is what is around them, with a prompt alone."""
    door = stack.enter_context(httpx.Client(base_url=cluster.server.url, timeout=120))
    (engine,) = done(door.get("/v1/engines"))["data"]
    assert streamed(door, "adapter-0", WORD, 16)[1] >= paces.step
    outside = first_seconds(door, ["adapter-0"], SHORT, 24) - SHORT * paces.prompt_token - paces.step
    return Service(
        **asdict(paces), fetch=0.0, seats=int(engine["seats"]), resident=slots, overhead=outside, on_cpu=True,
        reads_beside=True,
    )  # fmt: skip


class Replayed(Simulation):
    """These requests on the replicas of a cluster, by their own ids: homes are drawn as they were. Each engine is as
    slow as it was then: `began` has when each spell did, in the simulation and on this machine."""

    def __init__(
        self,
        cluster: Cluster,
        service: Service,
        requests: Sequence[Request],
        began: Sequence[tuple[float, float]] = (),
        draw: int = 0,
    ) -> None:
        load = Load(replicas=2, requests=1, warm=1, seed=draw)
        super().__init__(load, service, POLICY[cluster.name])
        self.requests = [replace(request) for request in requests]
        self.engines, self.began = cluster.engines, began
        for server, id in zip(self.servers, cluster.ids, strict=True):
            server.id = id
        self.policy.see(self.servers)

    def _slowness(self, server: Simulated, place: int, now: float) -> float:
        slow = super()._slowness(server, place, now)
        here = bisect_right(self.began, now, key=lambda spell: spell[0]) - 1
        if here < 0:
            return slow
        simulated, real = self.began[here]
        return slow * self.engines[place].at(real + now - simulated)


def predicted(
    cluster: Cluster, service: Service, every: Sequence[Sequence[Request]], spells: Sequence[Spell]
) -> dict[str, Any]:
    """The simulation's report on all spells, one after the other; the first is not counted. Routers draw between
    equals: it is the mean over `DRAWS`, with the p99 of each. At last as if each engine had had a processor, which is
    all that it says of engines whose steps take what they are given."""

    def report(began: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
        each = [Replayed(cluster, service, rows, began, draw).run() for draw in range(DRAWS)]
        means = {name: round(statistics.fmean(one[name] for one in each), 4) for name in each[0]}
        return means | {"p99 of each": [one["p99"] for one in each]}

    rows = [*in_a_row(every)]
    firsts = [rows[sum(map(len, every[:number]))].came - requests[0].came for number, requests in enumerate(every)]
    began = [*zip(firsts, (spell.began for spell in spells), strict=True)]
    quiet = report()
    return quiet if service.reads_beside else report(began) | {"quiet": quiet}


def in_a_row(every: Sequence[Sequence[Request]]) -> Iterator[Request]:
    began = 0.0
    for number, requests in enumerate(every):
        for request in requests:
            yield replace(request, came=began + request.came, counts=number > 0)
        began += requests[-1].came + 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1.6, help="requests a second")
    parser.add_argument("--burst", type=float, default=1.0)
    parser.add_argument("--prompt", type=float, default=32, help="tokens in the mean")
    parser.add_argument("--answer", type=float, default=16, help="tokens in the mean")
    parser.add_argument("--requests", type=int, default=80, help="of a spell")
    parser.add_argument("--pairs", type=int, default=6, help="of spells")
    parser.add_argument("--cost-pairs", type=int, default=16)
    parser.add_argument("--paced", action="store_true", help="engines of slow devices that nobody else uses")
    parser.add_argument("--json", type=Path, help="where everything goes that was measured")
    options = parser.parse_args()
    report: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}

    def tell(name: str, part: Any) -> None:
        report[name] = part
        print(json.dumps({name: part}, indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    tell("middleware alone", alone_cost())
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        both = clusters(stack, work, options.adapters, options.slots, PACES if options.paced else None)
        if options.paced:
            service = service_of_paces(stack, both[DEFAULT], PACES, options.slots)
        else:
            service = service_times(stack, both[DEFAULT], options.adapters, options.slots)
        tell("service", asdict(service))
        every = traces(options)
        with watching(*(engine for cluster in both.values() for engine in cluster.engines)):
            spells = beside(both, every)
        of = {name: [one for one in spells if one.on == (name == HOMES)] for name in both}
        spells = spells[2:]
        tell("measured", table(spells))
        tell("sent on by replicas", both[HOMES].forwarded())
        tell("predicted", {name: predicted(cluster, service, every, of[name]) for name, cluster in both.items()})
        if options.cost_pairs:
            tell("middleware", middleware_cost(both[HOMES], options.cost_pairs))
        if options.json:
            tell("spells", {name: [asdict(one) for one in mine] for name, mine in of.items()})
            tell("ids", {name: cluster.ids for name, cluster in both.items()})
            tell("engines", {name: [asdict(one) for one in cluster.engines] for name, cluster in both.items()})


if __name__ == "__main__":
    main()
