"""Canaries that are no different, slower, and much slower, on a simulated engine behind the real fair queue.

    python -m tests.campaigns.canary_aa [--streams 400] [--requests 1500] [--finished streams.jsonl]
    python -m tests.campaigns.canary_aa --others [--streams 20]

The first is about identical versions at every share and load, and goes on where it was stopped
(`tests.campaigns.finished_streams`); `--others` are few users, and versions that are slower or say more.

The real `FairQueue`, `Admission`, `Shares` and `CanaryAnalysis` with a clock of their own; the engine shares its time
among the sequences that it works on (the more there are, the slower each), and has a prefix cache that forgets what was
used least recently, by version. Arrivals are a Poisson process whose rate follows an AR(1), a daily wave and bursts; so
do the lengths of prompts and answers. Users are Zipf-distributed.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

from serve.adapters.registry.snapshot import Share
from serve.asgi.exchange import Exchange, Generation
from serve.engine.admission import Admission
from serve.engine.fair_queue import FairQueue, Ticket
from serve.errors import Overloaded
from serve.rollout.canary.askers import Asker
from serve.rollout.canary.canary import CanaryAnalysis
from serve.rollout.canary.traffic_split import Shares
from serve.sequential.sequential_test import Verdict
from tests.campaigns.finished_streams import FinishedStreams, add_options, digest, interval, run_chosen

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
LOADS = (0.3, 0.6, 0.9, 1.2)
SEATS = 16
# Seconds of a step: for itself, and for each sequence in it. A step gives each sequence a token.
STEP, STEP_SEQUENCE = 0.010, 0.001
# A prompt's work in steps: for itself, and for each token that is computed.
PREFILL, PREFILL_TOKEN = 2.0, 0.04
OPENINGS, CACHED_OPENINGS = 12, 14
NOISE = 0.15


@dataclass(frozen=True, slots=True)
class Case:
    """One stream. `slower` multiplies the work of the canary's tokens, `longer` how many it answers."""

    weight: float
    load: float
    slower: float = 1.0
    longer: float = 1.0
    users: int = 5_000
    alpha: float = 0.1
    period: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    reason: str
    requests: int
    canary: int
    refused: int
    waited: float  # seconds in the queue, on average
    report: dict[str, Any]


class Seats(FairQueue):
    """The real queue, which also says whom it has just given a seat."""

    def __init__(self, seats: int, slots: int) -> None:
        super().__init__(seats, slots)
        self.seated_now: list[Ticket] = []

    def _seat(self, ticket: Ticket) -> None:
        super()._seat(ticket)
        self.seated_now.append(ticket)


@dataclass(slots=True)
class Request:
    number: int
    canary: bool
    draw: bytes | None
    arrived: float
    seated: float = 0.0
    first: float = 0.0
    cached: int = 0


class Traffic:
    """What clients ask: arrays with a row for each request."""

    def __init__(self, case: Case, rng: np.random.Generator, count: int) -> None:
        rate = _wander(rng, count, 0.35)
        mood = _wander(rng, count, 0.2)
        self.user = _zipf(rng, case.users, count) if case.users else np.zeros(count, int)
        self.opening = _zipf(rng, OPENINGS, count)
        self.opening_tokens = np.linspace(100, 600, OPENINGS).astype(int)[self.opening]
        self.own_tokens = np.clip(rng.lognormal(4.0, 0.8, count) * mood, 4, 2000).astype(int)
        self.answer = np.clip(rng.lognormal(3.6, 0.6, count) * mood, 2, 400)
        if case.period:
            self.answer = np.where(np.arange(count) % case.period == 0, self.answer * 3, self.answer)
            self.own_tokens = np.where(np.arange(count) % case.period == 0, self.own_tokens * 5, self.own_tokens)
        work = PREFILL + PREFILL_TOKEN * (self.own_tokens + 60) + self.answer
        capacity = (SEATS - 2) / (STEP + STEP_SEQUENCE * (SEATS - 2)) / work.mean()
        self.arrived = np.cumsum(rng.exponential(1 / (case.load * capacity), count) / rate)
        self.noise = np.exp(rng.normal(0, NOISE, (count, 2)))


class Server:
    """One adapter with a live version and a canary, on one engine."""

    def __init__(self, case: Case, seed: int, requests: int, end: bool = True) -> None:
        self._case, self._end, self._seed = case, end, seed
        rng = np.random.default_rng(seed)
        self._traffic = Traffic(case, rng, requests)
        self._queue = Seats(SEATS, 4)
        self._admission = Admission(self._queue, 30.0)
        self._shares = Shares(seed)
        share = Share(SimpleNamespace(version=2), case.weight)  # type: ignore[arg-type]
        self.analysis = CanaryAnalysis("tone", 1, share, case.alpha, seed)
        self._waiting: dict[int, tuple[Ticket, Request, float]] = {}
        # Of the engine: how far each sequence has come, the running ones' ends and first tokens, by that.
        self._now = self._progress = 0.0
        self._running = 0
        self._events: list[tuple[float, int, bool, Ticket, Request]] = []
        self._cache: OrderedDict[tuple[bool, int], None] = OrderedDict()
        self.refused = self.ended = self.canary = 0
        self.waited = 0.0

    def run(self) -> Outcome:
        """Until the verdict, or the last request."""
        for number, arrived in enumerate(self._traffic.arrived):
            self._work_until(float(arrived))
            if self._end and self.analysis.verdict is not Verdict.UNDECIDED:
                break
            self._arrive(number)
        else:
            self._work_until(math.inf)
        verdict, waited = self.analysis.current_verdict(), self.waited / max(self.ended, 1)
        checks = [] if verdict is None else verdict.evidence["checks"]
        name = ",".join(check["check"] for check in checks if check["worse"])
        return Outcome(
            self.analysis.verdict,
            name,
            self.ended,
            self.canary,
            self.refused,
            waited,
            self.analysis.report(),
        )

    def _work_until(self, end: float) -> None:
        while self._events:
            pace = STEP + STEP_SEQUENCE * self._running
            at = self._now + (self._events[0][0] - self._progress) * pace
            if at > end:
                self._progress += (end - self._now) / pace
                break
            self._now = at
            self._progress, _, is_end, ticket, request = heapq.heappop(self._events)
            if is_end:
                self._finish(ticket, request)
            else:
                request.first = self._now
        self._now = max(self._now, end) if math.isfinite(end) else self._now

    def _arrive(self, number: int) -> None:
        draw = self._shares.deal("tone", 2, self._case.weight, Asker(self._user(number), f"{number}".encode()))
        request = Request(number, draw.taken, draw.name, self._now)
        try:
            forecast = self._admission.check("acme", 0)
        except Overloaded:
            self.refused += 1
            return
        ticket = self._queue.enter("acme", "tone@canary" if draw.taken else "tone@live")
        self._waiting[ticket.number] = ticket, request, forecast
        self._begin()

    def _user(self, number: int) -> bytes:
        return f"user {self._traffic.user[number]} of {self._seed}".encode()

    def _begin(self) -> None:
        """Have the engine begin with whoever was just seated."""
        traffic, case = self._traffic, self._case
        for ticket in self._queue.seated_now:
            _, request, forecast = self._waiting.pop(ticket.number)
            request.seated = self._now
            self._admission.seated(forecast, self._now - request.arrived)
            at = request.number
            request.cached = self._use(request.canary, int(traffic.opening[at]), int(traffic.opening_tokens[at]))
            computed = int(traffic.opening_tokens[at]) + int(traffic.own_tokens[at]) - request.cached
            slower, longer = (case.slower, case.longer) if request.canary else (1.0, 1.0)
            first = (PREFILL + PREFILL_TOKEN * computed) * traffic.noise[at, 0] * slower
            rest = max(round(float(traffic.answer[at]) * longer) - 1, 1) * traffic.noise[at, 1] * slower
            heapq.heappush(self._events, (self._progress + first, 2 * at, False, ticket, request))
            heapq.heappush(self._events, (self._progress + first + rest, 2 * at + 1, True, ticket, request))
            self._running += 1
        self._queue.seated_now.clear()

    def _use(self, canary: bool, opening: int, tokens: int) -> int:
        """Tokens of the opening that this version finds in the prefix cache."""
        known = (canary, opening) in self._cache
        self._cache[canary, opening] = None
        self._cache.move_to_end((canary, opening))
        if len(self._cache) > CACHED_OPENINGS:
            self._cache.popitem(last=False)
        return tokens if known else 0

    def _finish(self, ticket: Ticket, request: Request) -> None:
        self._running -= 1
        self._queue.leave(ticket)
        self._admission.left(self._now - request.seated)
        self.ended += 1
        self.canary += request.canary
        self.waited += request.seated - request.arrived
        if not self._end or self.analysis.verdict is Verdict.UNDECIDED:
            self.analysis.observe(self._exchange(request))
        self._begin()

    def _exchange(self, request: Request) -> Exchange:
        traffic, at = self._traffic, request.number
        longer = self._case.longer if request.canary else 1.0
        count = max(round(float(traffic.answer[at]) * longer), 2)
        prompt = range(int(traffic.opening_tokens[at]) + int(traffic.own_tokens[at]))
        made = Generation(
            prompt,
            range(count),
            "stop",
            queue=0.0,
            gap=(self._now - request.first) / (count - 1),
            prefill=request.first - request.seated,
            cached=request.cached,
        )
        return Exchange(
            "tone",
            "v2" if request.canary else "v1",
            200,
            request.first - request.arrived,
            self._now - request.arrived,
            asker=self._user(at),
            generations=(made,),
            dealt=True,
            seated=request.seated - request.arrived,
            draw=request.draw,
        )


def _wander(rng: np.random.Generator, count: int, size: float) -> np.ndarray:
    """A factor for each request, 1 on average: an AR(1), a daily wave and bursts, in units of `size`."""
    steps = rng.normal(0, math.sqrt(1 - 0.98**2), count)
    walk = np.zeros(count)
    for at in range(1, count):
        walk[at] = 0.98 * walk[at - 1] + steps[at]
    wave = 1.2 * np.sin(2 * np.pi * (np.arange(count) / 700 + rng.random()))
    burst = np.repeat(rng.random(count // 25 + 1) < 0.08, 25)[:count] * 2.5
    factor = np.exp(size * (walk + wave + burst))
    return factor / factor.mean()


def _zipf(rng: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    chances = 1 / np.arange(1, kinds + 1)
    return rng.choice(kinds, count, p=chances / chances.sum())


def streams(case: Case, count: int, requests: int, first_seed: int = 0) -> list[Outcome]:
    return [Server(case, first_seed + seed, requests).run() for seed in range(count)]


def told(outcomes: list[Outcome], verdict: Verdict) -> str:
    """How many came to this verdict, and after how many requests."""
    done = [outcome for outcome in outcomes if outcome.verdict is verdict]
    if not done:
        return f"0 of {len(outcomes)}"
    requests, canary = (np.median([getattr(outcome, name) for outcome in done]) for name in ("requests", "canary"))
    return f"{len(done)} of {len(outcomes)} (median {requests:.0f} requests, {canary:.0f} of the canary)"


# Identical versions, by name.
SAME = {f"{weight:.0%} at load {load}": Case(weight, load) for weight, load in product(SHARES, LOADS)}


def same(cell: str, seed: int, *, requests: int) -> dict[str, Any]:
    """What one stream of identical versions came to."""
    outcome = Server(SAME[cell], seed, requests).run()
    return {
        "worse": outcome.verdict is Verdict.WORSE,
        "reason": outcome.reason,
        "requests": outcome.requests,
        "waited": outcome.waited,
    }


def table(finished: FinishedStreams) -> None:
    print(
        "| share and load | streams | called worse | at most (95 %) | by | seconds in the queue |\n" + "|---" * 6 + "|"
    )
    every = {cell: lines for cell in SAME if (lines := finished.of(cell))}
    every |= {"all": [line for lines in every.values() for line in lines]}
    for cell, lines in every.items():
        worse = [line for line in lines if line["worse"]]
        most = interval(len(worse), len(lines))[1]
        reasons = " ".join(sorted({line["reason"] for line in worse})) or "-"
        waited = np.mean([line["waited"] for line in lines])
        print(f"| {cell} | {len(lines)} | {len(worse)} | {most:.1%} | {reasons} | {waited:.1f} |")


def others(count: int, requests: int) -> None:
    began = time.time()
    for users, period in ((0, 0), (0, 10), (50, 0)):
        outcomes = [
            outcome
            for weight, load in product((0.1, 0.5, 0.75), (0.6, 1.2))
            for outcome in streams(Case(weight, load, users=users, period=period), count, requests)
        ]
        print(f"same, {users or 'one'} users, period {period}: worse {told(outcomes, Verdict.WORSE)}", flush=True)
    for slower, weight, load in product((1.25, 3.0), (0.05, 0.1, 0.25, 0.5, 0.75), (0.6, 0.9, 1.2)):
        outcomes = streams(Case(weight, load, slower=slower, alpha=0.01), max(count // 2, 4), 4 * requests)
        worse, proved = told(outcomes, Verdict.WORSE), told(outcomes, Verdict.PROVED)
        print(f"{slower:.2f}x {weight:4.0%} load {load}: worse {worse}; proved {proved}", flush=True)
    for weight, load in product((0.1, 0.5), (0.6, 1.2)):
        outcomes = streams(Case(weight, load, longer=1.4), count, requests)
        print(f"1.4x as long answers {weight:4.0%} load {load}: worse {told(outcomes, Verdict.WORSE)}", flush=True)
    print(f"{time.time() - began:.0f} s")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options, streams=400)
    options.add_argument("--requests", type=int, default=1500)
    options.add_argument("--others", action="store_true", help="few users, and versions that are not the same")
    chosen = options.parse_args()
    if chosen.others:
        others(chosen.streams, chosen.requests)
        return
    queue = ("serve/engine/fair_queue.py", "serve/engine/admission.py", "tests/campaigns/canary_aa.py")
    finished = FinishedStreams(chosen.finished, digest("serve/rollout", *queue, requests=chosen.requests))
    run_chosen(finished, list(SAME), partial(same, requests=chosen.requests), chosen)
    table(finished)


if __name__ == "__main__":
    main()
