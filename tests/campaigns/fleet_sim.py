"""A fleet in simulated time: the code that places requests on replicas, beside other policies, on the same requests.

The placement is `serve.fleet`'s own, not a copy. A replica is a model: seats, an engine that loads adapters between its
steps, steps that compute a token of each answer under way and so many tokens of prompts, and room for so many adapters,
the least recently used of which goes. Its times are those of a measured engine with `--service FILE` (by `python -m
tests.campaigns.fleet_service_times FILE`), else those of `ASSUMED`, which is no engine.

    python -m tests.campaigns.fleet_sim                           the table of docs/benchmarks.md
    python -m tests.campaigns.fleet_sim --adapters 200 --zipf 1.2 --warm 20000
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from serve.fleet.homes import Replica, Replicas, order
from serve.fleet.placement import Placement
from tests.campaigns.fleet_load import Load, Request, Trace, happenings, requests_of


@dataclass(frozen=True)
class Service:
    """What an engine takes, in seconds, and what it has room for."""

    step: float
    step_per_answer: float
    prompt_token: float
    load: float
    # Until the bytes of an adapter are on a replica that never had them; the engine works on meanwhile.
    fetch: float
    seats: int
    resident: int
    # Between client and engine, for each request.
    overhead: float = 0.0
    # How many times as long everything takes while another replica works, which shares the processor.
    beside: float = 1.0
    # Tokens of prompts that a step computes at most, as vLLM has it.
    step_tokens: int = 2048
    # Whether adapters are read one after another beside the steps, which take none of their time for it. As in a
    # server, an engine begins to read between two steps, and tells between two that it has.
    reads_beside: bool = False
    # Whether a step beside answers takes no more of prompts than `serve.cpu_kernels.prompt_budget` lets it.
    on_cpu: bool = False

    def sustained(self, load: Load) -> float:
        """Requests a second of one replica, with every seat taken and every adapter there."""
        prompt, answer = load.mean
        step = self.step + self.seats * self.step_per_answer
        return 1 / (answer * step / self.seats + prompt * self.prompt_token)


# Prompts cost little beside adapters, as on a GPU, and every adapter of ten thousand is held by one of twenty replicas.
ASSUMED = Service(step=0.02, step_per_answer=0.0005, prompt_token=0.0001, load=0.2, fetch=0.5, seats=32, resident=640)


@dataclass(slots=True)
class Prompt:
    """A prompt that is computed, and how many of its tokens are not."""

    request: Request
    left: int


@dataclass(eq=False)
class Server:
    """One replica, as it is modelled."""

    id: str
    service: Service
    slow: float = 1.0
    alive: bool = True
    running: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    # Of those that have a seat: whose adapter's bytes are here, whose prompt is computed, with what is left of it, and
    # who is answered, by the number of the step that ends it.
    ready: deque[Request] = field(default_factory=deque)
    prompts: list[Prompt] = field(default_factory=list)
    answers: list[tuple[int, int, Request]] = field(default_factory=list)
    steps: int = 0
    is_busy: bool = False
    under_way: set[int] = field(default_factory=set)
    # By adapter: when its bytes are here, whether or not it is in the engine by now.
    held: OrderedDict[str, float] = field(default_factory=OrderedDict)
    loaded: set[str] = field(default_factory=set)
    in_use: Counter[str] = field(default_factory=Counter)
    bytes_here: set[str] = field(default_factory=set)
    # Of adapters that are read beside the steps: which are to be, until when some are, which have been, and who waits
    # for which. Then who waits until one of those that are here is not in use.
    to_read: list[str] = field(default_factory=list)
    reading: float = 0.0
    read: list[str] = field(default_factory=list)
    waiting_for: dict[str, list[Request]] = field(default_factory=dict)
    roomless: deque[Request] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return self.running + len(self.waiting)


class Policy(Protocol):
    """Chooses a place among the servers that live."""

    def see(self, servers: Sequence[Server]) -> None: ...
    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int: ...


class Random2:
    """Ray Serve's default: the one with less to do of two at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.places: list[int] = []

    def see(self, servers: Sequence[Server]) -> None:
        self.places = [place for place, server in enumerate(servers) if server.alive]

    def of(self, places: Sequence[int], loads: Sequence[int]) -> int:
        """Two in a random order: of equals, the first."""
        if len(places) < 2:
            return places[0]
        one, other = int(self.random.random() * len(places)), int(self.random.random() * (len(places) - 1))
        other += other >= one
        return min((places[one], places[other]), key=loads.__getitem__)

    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int:
        return self.of(self.places, loads)


class Multiplex(Random2):
    """Ray Serve's MultiplexMixin: replicas that hold the model, else those that hold fewest models."""

    def __init__(self, seed: int, servers: Sequence[Server]) -> None:
        super().__init__(seed)
        self.servers = servers

    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int:
        holding = [place for place in holders.get(name, ()) if self.servers[place].alive]
        if not holding:
            least = min(len(self.servers[place].held) for place in self.places)
            holding = [place for place in self.places if len(self.servers[place].held) == least]
        return self.of(holding, loads)


class Ordered(Random2):
    """Rendezvous hashing with one replica a name: plain consistent hashing."""

    def see(self, servers: Sequence[Server]) -> None:
        super().see(servers)
        self.replicas = Replicas.of(Replica(servers[place].id) for place in self.places)
        where = {server.id: place for place, server in enumerate(servers)}
        self.at = [where[member.id] for member in self.replicas.members]
        self.orders: dict[str, list[int]] = {}

    def order(self, name: str) -> list[int]:
        if name not in self.orders:
            self.orders[name] = [self.at[place] for place in order(self.replicas, name)]
        return self.orders[name]

    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int:
        return self.order(name)[0]


class ReplicaSets(Ordered):
    """As Dynamo does it: so many replicas a name as its share of 90 s asks for (smoothed by 0.3 every 3 s, changed at
    most every third time), and of these the one with least to do."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: deque[tuple[float, str]] = deque()
        self.counts: Counter[str] = Counter()
        self.shares: dict[str, float] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.tick, self.next = 0, 3.0

    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int:
        self.asked.append((now, name))
        self.counts[name] += 1
        while now >= self.next:
            self._step()
        size, _ = self.sizes.get(name, (1, 0))
        return min(self.order(name)[:size], key=loads.__getitem__)

    def _step(self) -> None:
        self.tick, self.next = self.tick + 1, self.next + 3.0
        while self.asked and self.asked[0][0] < self.next - 93.0:
            self.counts[self.asked.popleft()[1]] -= 1
        self.counts += Counter()  # drops what is 0
        total = max(len(self.asked), 1)
        for name in self.counts.keys() | self.shares.keys():
            share = self.shares.get(name, 0.0)
            share += 0.3 * (self.counts[name] / total - share)
            if share * len(self.places) < 0.1 and name not in self.sizes:
                self.shares.pop(name, None)
                continue
            self.shares[name] = share
            wanted = max(1, math.ceil(share * len(self.places)))
            size, changed = self.sizes.get(name, (1, -3))
            if wanted != size and self.tick - changed >= 3:
                self.sizes[name] = wanted, self.tick


class Homes(Random2):
    """This project's."""

    def __init__(self, seed: int, service: Service) -> None:
        super().__init__(seed)
        self.slots = service.resident
        self.placement = Placement(seats=service.seats)

    def see(self, servers: Sequence[Server]) -> None:
        super().see(servers)
        self.placement.see(Replica(servers[place].id, self.slots) for place in self.places)
        where = {server.id: place for place, server in enumerate(servers)}
        self.at = [where[member.id] for member in self.placement.members]
        self.back = {place: number for number, place in enumerate(self.at)}

    def choose(self, name: str, now: float, loads: Sequence[int], holders: dict[str, set[int]]) -> int:
        living = [loads[place] for place in self.at]
        holding = [self.back[place] for place in holders.get(name, ()) if place in self.back]
        self.placement.count(name)
        first = self.placement.ranks(name, living, now, holders=holding)[0]
        return self.at[self.of(first, living)]


POLICIES = ("homes", "power of two", "multiplex", "consistent hash", "replica sets")


def policy_of(name: str, seed: int, servers: Sequence[Server], service: Service) -> Policy:
    match name:
        case "homes":
            return Homes(seed, service)
        case "multiplex":
            return Multiplex(seed, servers)
        case "consistent hash":
            return Ordered(seed)
        case "replica sets":
            return ReplicaSets(seed)
    return Random2(seed)


class Simulation:
    """One policy on one load."""

    def __init__(self, load: Load, service: Service, policy: str) -> None:
        self.service = service
        self.servers = [Server(f"replica-{number}", service) for number in range(load.replicas)]
        self.policy = policy_of(policy, load.seed, self.servers, service)
        self.policy.see(self.servers)
        self.holders: dict[str, set[int]] = defaultdict(set)
        self.events: list[tuple[float, int, str, Any, int]] = []
        self.numbers = itertools.count()
        self.requests, began, end = requests_of(load, service.sustained(load))
        self.open: dict[int, Request] = {}
        self.firsts: list[float] = []
        self.cold = self.counted = self.moved = 0
        self.last_place: dict[str, int] = {}
        self.worst: list[float] = []
        self.loads = [0] * load.replicas
        self.budget = _budget(service) if service.on_cpu else None
        for when, what, place in happenings(load, began, end):
            self._at(when, what, place)

    def run(self) -> dict[str, Any]:
        """Everything until the last answer; the report."""
        arrivals = iter(self.requests)
        coming = next(arrivals, None)
        while coming is not None or self.events:
            if coming is not None and (not self.events or coming.came <= self.events[0][0]):
                self._route(coming, coming.came)
                coming = next(arrivals, None)
                continue
            now, _, what, subject, tries = heapq.heappop(self.events)
            self._happen(now, what, subject, tries)
        return self._report()

    def _at(self, when: float, what: str, subject: Any, tries: int = 0) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, subject, tries))

    def _happen(self, now: float, what: str, subject: Any, tries: int) -> None:
        if what == "ready":
            if subject.tries == tries:  # its replica lives
                self._ready(subject, now)
        elif what == "stepped":
            if self.servers[tries] is subject:
                self._stepped(subject, tries, now)
        elif what == "read":
            server = self.servers[tries]
            server.read.append(subject)
            if not server.is_busy:
                self._tell_read(server, now)
        elif what in ("slow", "well"):
            self.servers[subject].slow = 4.0 if what == "slow" else 1.0
        elif what == "die":
            self._die(subject, now)
        elif what == "join":
            self._join(subject)

    def _route(self, request: Request, now: float) -> None:
        place = self.policy.choose(request.name, now, self.loads, self.holders)
        request.place = place
        server = self.servers[place]
        self.open[id(request)] = request
        server.under_way.add(id(request))
        self.loads[place] += 1
        if request.counts:
            self.counted += 1
            if self.counted % 50 == 0:
                living = [self.loads[at] for at, one in enumerate(self.servers) if one.alive]
                self.worst.append(max(living) / max(sum(living) / len(living), 1))
        if server.running < server.service.seats:
            self._begin(request, now)
        else:
            server.waiting.append(request)

    def _begin(self, request: Request, now: float) -> None:
        """It has a seat; its adapter is fetched, if the bytes are not there."""
        self.servers[request.place].running += 1
        self._seated(request, now)

    def _seated(self, request: Request, now: float) -> None:
        server, name = self.servers[request.place], request.name
        if name not in server.held and not self._has_room(server, request.place):
            server.roomless.append(request)
            return
        server.in_use[name] += 1
        if name in server.held:
            server.held.move_to_end(name)
        else:
            self.cold += request.counts
            if request.counts and self.last_place.get(name, request.place) != request.place:
                self.moved += 1
            self.last_place[name] = request.place
            server.held[name] = now + (0 if name in server.bytes_here else server.service.fetch)
            if server.service.reads_beside:
                server.held[name], server.waiting_for[name] = math.inf, []
                server.loaded.add(name)
                server.to_read.append(name)
                if not server.is_busy:
                    self._read(server, request.place, now)
            server.bytes_here.add(name)
            self.holders[name].add(request.place)
        if name in server.waiting_for:
            server.waiting_for[name].append(request)
        elif server.held[name] > now:
            self._at(server.held[name], "ready", request, request.tries)
        else:
            self._ready(request, now)

    def _read(self, server: Server, place: int, now: float) -> None:
        """Those that are to be, one after another."""
        for name in server.to_read:
            server.reading = max(now, server.reading) + server.service.load
            self._at(server.reading, "read", name, place)
        server.to_read = []

    def _tell_read(self, server: Server, now: float) -> None:
        """Who waited for those that have been is taken up when this moment's step has ended."""
        for name in server.read:
            server.held[name] = now
            for request in server.waiting_for.pop(name, ()):
                self._ready(request, now)
        server.read = []

    def _has_room(self, server: Server, place: int) -> bool:
        """For one adapter more: the one goes that was used least lately, of those that nobody uses."""
        if len(server.held) >= server.service.resident:
            victim = next((name for name in server.held if not server.in_use[name]), None)
            if victim is None:
                return False
            del server.held[victim]
            server.loaded.discard(victim)
            self.holders[victim].discard(place)
        return True

    def _ready(self, request: Request, now: float) -> None:
        """The bytes of its adapter are here: the engine takes it up with its next step."""
        server = self.servers[request.place]
        server.ready.append(request)
        if not server.is_busy:
            self._step(server, request.place, now)

    def _step(self, server: Server, place: int, now: float) -> None:
        """Adapters that are new are loaded, then a step is computed."""
        service, loads = self.service, 0
        while server.ready:
            request = server.ready.popleft()
            if request.name not in server.loaded:
                server.loaded.add(request.name)
                loads += 1
            server.prompts.append(Prompt(request, request.prompt))
        server.is_busy = bool(server.prompts or server.answers)
        if not server.is_busy:
            return
        tokens = self._compute(server) if server.prompts else 0
        seconds = service.load * loads + service.prompt_token * tokens
        seconds += service.step + service.step_per_answer * len(server.answers)
        self._at(now + seconds * self._slowness(server, place, now), "stepped", server, place)

    def _compute(self, server: Server) -> int:
        """Some of the prompts, the first come first; how many tokens."""
        room = self.service.step_tokens
        if self.budget and server.answers:
            server.prompts.sort(
                key=lambda prompt: prompt.request.came + prompt.request.prompt * self.service.prompt_token
            )
            room = min(room, self.budget(len(server.answers), server.prompts))
        tokens = room
        for prompt in server.prompts:
            computed = min(prompt.left, tokens)
            prompt.left -= computed
            tokens -= computed
        return room - tokens

    def _stepped(self, server: Server, place: int, now: float) -> None:
        server.steps += 1
        while server.answers and server.answers[0][0] <= server.steps:
            self._ended(heapq.heappop(server.answers)[2], now)
        for prompt in server.prompts:
            request = prompt.request
            if prompt.left:
                continue
            if request.first < 0:
                request.first = now - request.came + self.service.overhead
            if request.answer > 1:
                heapq.heappush(server.answers, (server.steps + request.answer - 1, next(self.numbers), request))
            else:
                self._ended(request, now)
        server.prompts = [prompt for prompt in server.prompts if prompt.left]
        self._read(server, place, now)
        self._step(server, place, now)
        self._tell_read(server, now)

    def _slowness(self, server: Server, place: int, now: float) -> float:
        """How many times as long as alone everything takes there now."""
        if self.service.beside > 1 and any(other.is_busy for other in self.servers if other is not server):
            return server.slow * self.service.beside
        return server.slow

    def _ended(self, request: Request, now: float) -> None:
        server = self.servers[request.place]
        if request.counts:
            self.firsts.append(request.first)
        self.open.pop(id(request))
        server.under_way.discard(id(request))
        self.loads[request.place] -= 1
        server.running -= 1
        server.in_use[request.name] -= 1
        if server.waiting:
            self._begin(server.waiting.popleft(), now)
        for _ in range(len(server.roomless)):
            self._seated(server.roomless.popleft(), now)

    def _die(self, place: int, now: float) -> None:
        """What it worked on is asked again elsewhere."""
        dead = self.servers[place]
        lost = [self.open[number] for number in sorted(dead.under_way, key=lambda number: self.open[number].came)]
        self.servers[place] = replace(Server(dead.id, self.service), alive=False)
        self.loads[place] = 0
        for holders in self.holders.values():
            holders.discard(place)
        self.policy.see(self.servers)
        for request in lost:
            request.tries += 1
            self.counted -= request.counts
            self._route(request, now)

    def _join(self, place: int) -> None:
        if place < len(self.servers):
            self.servers[place].alive = True
        else:
            self.servers.append(Server(f"replica-{place}", self.service))
            self.loads.append(0)
        self.policy.see(self.servers)

    def _report(self) -> dict[str, Any]:
        p50, p95, p99 = (float(np.percentile(self.firsts, part)) for part in (50, 95, 99))
        return {
            "p50": round(p50, 4),
            "p95": round(p95, 4),
            "p99": round(p99, 4),
            "cold": self.cold,
            "cold_share": round(self.cold / max(self.counted, 1), 4),
            "moved": self.moved,
            "imbalance": round(float(np.mean(self.worst)), 2) if self.worst else 0.0,
            "requests": self.counted,
        }


def _budget(service: Service) -> Callable[[int, Sequence[Prompt]], int]:
    """Of an engine on a processor, which has learned these times."""
    from serve.cpu_kernels.prompt_budget import PromptBudget
    from serve.cpu_kernels.step_costs import Piece, StepCosts

    class Known(StepCosts):
        def alone(self, answers: int) -> float:
            return service.step + service.step_per_answer * answers

        def unknown(self, answers: int) -> bool:
            return False

    budget = PromptBudget(None, Known(token=service.prompt_token, kept=1.0))

    def tokens(answers: int, prompts: Sequence[Prompt]) -> int:
        pieces = [Piece(prompt.request.prompt - prompt.left, prompt.left) for prompt in prompts]
        return budget.tokens(answers, pieces, len(pieces))

    return tokens


def simulate(load: Load, service: Service, policies: Sequence[str] = POLICIES) -> dict[str, dict[str, Any]]:
    """The report of each policy on the same requests."""
    return {policy: Simulation(load, service, policy).run() for policy in policies}


def fewest(load: Load, service: Service, policy: str, objective: float) -> int:
    """Replicas of these requests, as many a second as they are, so that p99 of the first token is at most `objective`
    seconds; none above eight times as many as `load` has."""
    below, enough = 0, 8 * load.replicas
    while enough - below > 1:
        some = (below + enough) // 2
        asked = replace(load, replicas=some, use=load.use * load.replicas / some)
        if Simulation(asked, service, policy).run()["p99"] <= objective:
            enough = some
        else:
            below = some
    return enough


def ratios(reports: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of homes: p99 of the first token beside power of two and the best other, and cold loads beside power of two."""
    homes, two = reports["homes"], reports["power of two"]
    others = [report["p99"] for policy, report in reports.items() if policy not in ("homes", "power of two")]
    return {
        "p99_to_power_of_two": round(homes["p99"] / two["p99"], 3),
        "p99_to_best_other": round(homes["p99"] / min(others), 3),
        "cold_to_power_of_two": round(homes["cold"] / max(two["cold"], 1), 3),
    }


def loads(options: argparse.Namespace) -> Iterator[Load]:
    """The loads of a whole run, or the one that was asked for."""
    trace = Trace.read(options.trace) if options.trace else None
    requests = min(options.requests, len(trace.gaps)) if trace else options.requests
    first = Load(requests=requests, warm=options.warm, use=options.use, seed=options.seed, trace=trace)
    if options.adapters or options.zipf or options.events or trace:
        yield replace(
            first,
            adapters=options.adapters or first.adapters,
            zipf=options.zipf or first.zipf,
            events=options.events or first.events,
        )
        return
    for adapters, zipf in itertools.product((200, 10_000, 100_000), (0.8, 1.0, 1.2)):
        yield replace(first, adapters=adapters, zipf=zipf)
    for events in ("diurnal", "flash crowd", "replicas die, join, slow down"):
        yield replace(first, events=events)


def service_of(path: Path) -> Service:
    return Service(**json.loads(path.read_text())["service"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", type=Path, help="times of a measured engine")
    parser.add_argument("--resident", type=int, help="adapters that a replica holds, in place of the file's")
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--zipf", type=float)
    parser.add_argument("--events", choices=("steady", "diurnal", "flash crowd", "replicas die, join, slow down"))
    parser.add_argument("--use", type=float, default=0.6, help="part of what the replicas sustain that is asked")
    parser.add_argument("--trace", type=Path, help="a public trace: TIMESTAMP,ContextTokens,GeneratedTokens")
    parser.add_argument("--objective", type=float, help="also the fewest replicas of p99 below so many seconds")
    parser.add_argument("--requests", type=int, default=80_000)
    parser.add_argument("--warm", type=int, default=400_000, help="requests before those that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", type=Path, help="where the reports go")
    options = parser.parse_args()
    service = service_of(options.service) if options.service else ASSUMED
    if options.resident:
        service = replace(service, resident=options.resident)
    print(f"service: {asdict(service)}")
    out = []
    for load in loads(options):
        sustained = service.sustained(load)
        print(f"\n{load.replicas} replicas, {load.adapters} adapters, Zipf {load.zipf}, {load.events}, use {load.use}")
        print(f"  tokens of a prompt, an answer: {load.mean}; a replica sustains {sustained:.2f} requests a second")
        reports = simulate(load, service, options.policies.split(","))
        for policy, report in reports.items() if options.objective else ():
            report["fewest"] = fewest(load, service, policy, options.objective)
        out.append({"load": asdict(replace(load, trace=None)), "trace": options.trace, "reports": reports})
        for policy, report in reports.items():
            print(f"  {policy:16} " + "  ".join(f"{name} {value}" for name, value in report.items()))
        if len(reports) == len(POLICIES):
            out[-1]["ratios"] = ratios(reports)
            print(f"  ratios           {out[-1]['ratios']}")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps({"service": asdict(service), "runs": out}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
