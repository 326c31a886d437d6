"""What every panel of every dashboard must show after known traffic, by dashboard and title.

A panel without an entry here fails the test that reads this: say what it shows, in terms of what was sent.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client.utils import floatToGoString

from serve.telemetry.prices import Price
from serve.telemetry.series import ENGINE_QUEUE_SECONDS, QUEUE_SECONDS, TOTAL_SECONDS, WORST_GAP_SECONDS
from serve.telemetry.slo import DEFAULT_SLOS, FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, Objective
from tests.support import known_backend
from tests.support.mixed_traffic import GOLDEN_RESULTS, GOLDEN_SCORE, HELD, MixedTraffic, Sent
from tests.support.prometheus import Sample

Key = tuple[str, ...]
# By Key. A mapping is invariant in its keys: Mapping[Key, float] would take no dict by pairs.
Values = Mapping[Any, float]
Choices = dict[str, str]
ONE: Key = ()
VERSION = ("adapter", "version")
REASONS = ("overloaded", "unavailable", "queue_deadline", "deadline", "error")
SEATS = known_backend.KnownBackend.seats
PRICE = Price(prompt=1.0, generated=2.0, engine_hour=3600.0)
ERROR_BUDGET = next(slo.budget for slo in DEFAULT_SLOS if slo.objective is Objective.ERRORS)


@dataclass(frozen=True)
class Shows:
    """What one query returns: by the values of the labels `by`, each between two numbers.

    Samples that are not named here must be 0; with `some`, not all that are named must be there. `held`: asked of the
    time at which the queue stood. `choices` are the dashboard's variables. `absent`: nothing is to be shown yet.
    """

    by: Key
    ranges: Mapping[Key, tuple[float, float]]
    held: bool = False
    some: bool = False
    absent: bool = False
    choices: Choices = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """What was sent, and what the server says of itself afterwards; `window` is what Grafana's rates go over."""

    traffic: MixedTraffic
    waiting: Mapping[tuple[str, str], int]
    held_up: float  # seconds that the queue stood, at least
    window: float
    firing: Sequence[Mapping[str, str]]
    drift: Mapping[Key, Mapping[str, float]]  # by adapter, version and signal
    effects: Values
    canary: Values
    limit: float
    to_proof: Values  # what is in sight of it
    states: Mapping[tuple[str, str], str]
    scrape: str
    golden: Mapping[str, Any]  # of echo's live version
    golden_set: str
    shadow: Sequence[Mapping[str, Any]]  # of echo's
    files: Sequence[int]  # bytes of each

    def total(self, number: Callable[[Sent], float] = lambda sent: 1) -> float:
        return sum(map(number, self.traffic.sent))

    @property
    def computed(self) -> list[Sent]:
        """What the engine has computed for clients, also where the server asked in their name."""
        return [sent for sent in (*self.traffic.sent, *self.traffic.inside) if sent.reached and not sent.background]

    def count(self, key: Callable[[Sent], Key | None], number: Callable[[Sent], float] = lambda sent: 1) -> Values:
        """Numbers of what was sent, summed by key; what has none is left out."""
        counts: defaultdict[Key, float] = defaultdict(float)
        for sent in self.traffic.sent:
            if (of := key(sent)) is not None:
                counts[of] += number(sent)
        return counts

    def rate(self, values: Values) -> Values:
        return {key: value / self.window for key, value in values.items()}

    def rates(self, key: Callable[[Sent], Key | None], number: Callable[[Sent], float] = lambda sent: 1) -> Values:
        return self.rate(self.count(key, number))

    def scraped(self, metric: str) -> float:
        """A series without labels, as the server shows it now."""
        (line,) = (line for line in self.scrape.splitlines() if line.startswith(f"{metric} "))
        return float(line.split()[1])


def exactly(by: Key, values: Values, *, held: bool = False, **choices: str) -> Shows:
    slack = {key: (value - abs(value) * 1e-6 - 1e-9, value + abs(value) * 1e-6 + 1e-9) for key, value in values.items()}
    return Shows(by, slack, held, choices=choices)


def one(value: float, *, held: bool = False) -> Shows:
    return exactly((), {ONE: value}, held=held)


def of_adapter(sent: Sent) -> Key:
    return (sent.adapter,)


def of_version(sent: Sent) -> Key:
    return sent.labels


def answered(key: Callable[[Sent], Key]) -> Callable[[Sent], Key | None]:
    return lambda sent: key(sent) if sent.status == 200 else None


def judged(sent: Sent) -> bool:
    """It counts for or against the server."""
    return sent.status // 100 != 4 or sent.failure == "overloaded"


def share_failed(world: World, key: Callable[[Sent], Key]) -> Values:
    failed = world.count(lambda sent: key(sent) if sent.failure else None)
    every = world.count(lambda sent: key(sent) if judged(sent) else None)
    return {of: failed.get(of, 0) / count for of, count in every.items()}


def failures(world: World, key: Callable[[Sent], Key]) -> Values:
    return world.rates(lambda sent: (*key(sent), sent.failure) if sent.failure else None)


def interpolated(q: float, value: float, bounds: Sequence[float]) -> float:
    """histogram_quantile of observations that all have this value: it takes them for even within their bucket."""
    bucket = bisect_left(bounds, value)
    low = bounds[bucket - 1] if bucket else 0.0
    return low + q * (bounds[bucket] - low)


def same(by: Key, keys: Iterable[Key], q: float, value: float, bounds: Sequence[float]) -> Shows:
    return exactly(by, dict.fromkeys(keys, interpolated(q, value, bounds)))


def between(
    world: World,
    by: Key,
    key: Callable[[Sent], Key | None],
    bounds: Sequence[float],
    least: float = known_backend.ANSWER_SECONDS,
) -> Shows:
    """A quantile of what a clock says: at least what the engine took, at most what clients saw, by buckets."""
    slowest: dict[Key, float] = {}
    for sent in world.traffic.sent:
        if (of := key(sent)) is not None:
            slowest[of] = max(slowest.get(of, 0.0), sent.seconds)
    below = bisect_left(bounds, least)
    low = bounds[below - 1] if below else 0.0
    ranges = {of: (low, bounds[min(bisect_left(bounds, most), len(bounds) - 1)]) for of, most in slowest.items()}
    return Shows(by, ranges)


def firing(world: World) -> Shows:
    by = ("alertname", "severity", "adapter", "version", "tenant", "cause", "slo")
    rows = Counter(tuple(labels.get(name, "") for name in by) for labels in world.firing)
    return exactly(by, rows)


def budgets(world: World) -> Shows:
    """Exact where everything or nothing failed; in between it depends on the order, too."""
    ranges: dict[Key, tuple[float, float]] = {}
    for (adapter,), share in share_failed(world, of_adapter).items():
        worst = 1 - 1 / ERROR_BUDGET
        low, high = (1.0, 1.0) if share == 0 else (worst, worst) if share == 1 else (worst, 1.0)
        ranges[adapter, "errors"] = (low - 1e-6 * abs(low), high + 1e-6)
    for (adapter,) in world.count(answered(of_adapter)):
        ranges |= {(adapter, str(slo)): (-20.0, 1.000001) for slo in Objective if slo is not Objective.ERRORS}
    return Shows(("adapter", "slo"), ranges)


def burns(world: World) -> Shows:
    shares = share_failed(world, of_adapter)
    ranges = exactly((), {(*of, "errors"): share / ERROR_BUDGET for of, share in shares.items()}).ranges
    rest: dict[Key, tuple[float, float]] = {
        (adapter, str(slo)): (0.0, 20.000001)
        for (adapter,) in world.count(answered(of_adapter))
        for slo in Objective
        if slo is not Objective.ERRORS
    }
    return Shows(("adapter", "slo"), {**ranges, **rest})


def in_states(world: World) -> list[Shows]:
    codes = ("disk", "host", "slot", "failed")
    return [
        exactly(VERSION, {labels: code for labels, state in world.states.items() if state == name})
        for code, name in enumerate(codes, 1)
    ]


def of_drift(world: World, number: str) -> Values:
    return {key: numbers[number] for key, numbers in world.drift.items()}


def sides(world: World, number: Callable[[str], Shows]) -> list[Shows]:
    """For the two versions of `calm`, which the Swap dashboard compares."""
    return [number(version) for version in ("v1", "v2")]


def of_side(version: str) -> Callable[[Sent], Key | None]:
    return lambda sent: ONE if sent.labels == ("calm", version) else None


def side_answered(version: str) -> Callable[[Sent], Key | None]:
    return lambda sent: ONE if sent.labels == ("calm", version) and sent.status == 200 else None


def side_share(world: World, version: str, part: Callable[[Sent], float]) -> Shows:
    """Of what was answered."""
    every = world.count(side_answered(version))[ONE]
    return one(world.count(of_side(version), part)[ONE] / every)


def rolled_back(world: World) -> list[Shows]:
    count = world.traffic.rollbacks["tone"]
    return [
        exactly(("adapter",), {("tone",): count}, adapter="tone"),
        exactly(("version", "reason"), {("v2", "alert"): count}, adapter="tone"),
    ]


QUANTILES = (0.5, 0.95, 0.99)


def answers_everywhere(bounds: Sequence[float]) -> Callable[[World], list[Shows]]:
    return lambda world: [between(world, (), answered(lambda sent: ONE), bounds) for _ in QUANTILES]


def gaps_everywhere(value: float, bounds: Sequence[float]) -> Callable[[World], list[Shows]]:
    return lambda world: [same((), [ONE], q, value, bounds) for q in QUANTILES]


def reached(world: World) -> Values:
    return world.count(lambda sent: sent.labels if sent.reached else None)


def tokens(world: World) -> list[Shows]:
    prompt, generated = world.total(lambda sent: sent.prompt), world.total(lambda sent: sent.generated)
    return [one(prompt / world.window), one(generated / world.window)]


def waited(world: World, by: Key, key: Callable[[Sent], Key | None]) -> Shows:
    """Time in the server's own queue: no longer than the whole request took."""
    return between(world, by, lambda sent: key(sent) if sent.version and sent.failure != "overloaded" else None,
                   QUEUE_SECONDS, 0.0)  # fmt: skip


OVERVIEW: dict[str, Callable[[World], list[Shows]]] = {
    "Server": lambda world: [one(1)],
    "Engine": lambda world: [one(1)],
    "Alerts": lambda world: [one(len(world.firing))],
    "Requests": lambda world: [one(world.total() / world.window)],
    "Errors": lambda world: [exactly((), share_failed(world, lambda sent: ONE))],
    "First token, p95": lambda world: answers_everywhere(FIRST_TOKEN_SECONDS)(world)[:1],
    "Error budget left, 30 days": lambda world: [budgets(world)],
    "Burn rate, 1 hour": lambda world: [burns(world)],
    "Requests by adapter": lambda world: [exactly(("adapter",), world.rates(of_adapter))],
    "Errors by adapter": lambda world: [exactly(("adapter",), share_failed(world, of_adapter))],
    "Waiting for a seat": lambda world: [
        exactly(("adapter",), {(adapter,): count for (adapter, _), count in world.waiting.items()}, held=True)
    ],
    "Failures by reason": lambda world: [exactly(("adapter", "reason"), failures(world, of_adapter))],
    "First token": answers_everywhere(FIRST_TOKEN_SECONDS),
    "Between tokens": gaps_everywhere(known_backend.GAP, INTER_TOKEN_SECONDS),
    "Tokens": tokens,
    "Firing alerts": lambda world: [firing(world)],
    "Cost of watching": lambda world: [
        one(world.scraped("loradock_tap_seconds_sum") / world.scraped("loradock_tap_seconds_count")),
        Shows((), {ONE: (0.0, 0.025)}),
        one(world.scraped("loradock_watcher_seconds_total") / world.scraped("loradock_watcher_requests_total")),
    ],
    "Exchanges that were not looked at": lambda world: [
        one(0),
        exactly(("worker",), {("capture",): 0, ("data_quality",): 0}),
    ],
}
ADAPTERS: dict[str, Callable[[World], list[Shows]]] = {
    "Where the weights are": in_states,
    "Versions that are there": lambda world: [exactly(VERSION, dict.fromkeys(world.states, 1))],
    "Requests": lambda world: [exactly(VERSION, world.rates(of_version))],
    "Errors": lambda world: [exactly(VERSION, share_failed(world, of_version))],
    "First token, p95": lambda world: [between(world, VERSION, answered(of_version), FIRST_TOKEN_SECONDS)],
    "Between tokens, p95": lambda world: [same(VERSION, reached(world), 0.95, known_backend.GAP, INTER_TOKEN_SECONDS)],
    "Worst gap between tokens, p95": lambda world: [
        same(VERSION, reached(world), 0.95, known_backend.WORST_GAP, WORST_GAP_SECONDS)
    ],
    "Whole answer, p95": lambda world: [between(world, VERSION, answered(of_version), TOTAL_SECONDS)],
    "In the queue, p95": lambda world: [waited(world, VERSION, of_version)],
    "In the engine's queue, p95": lambda world: [
        same(VERSION, reached(world), 0.95, known_backend.QUEUE, ENGINE_QUEUE_SECONDS)
    ],
    "Failures by reason": lambda world: [exactly((*VERSION, "reason"), failures(world, of_version))],
    "Under way": lambda world: [
        exactly(
            VERSION,
            {
                (adapter, "v1"): count + (1 if adapter == "zeta/slow" else SEATS - 1)
                for (adapter, _), count in world.waiting.items()
            },
            held=True,
        )
    ],
    "Generated tokens": lambda world: [exactly(VERSION, world.rates(of_version, lambda sent: sent.generated))],
    "How answers end": lambda world: [
        exactly((*VERSION, "finish_reason"), world.rates(lambda sent: (*sent.labels, sent.finish)))
    ],
    "Swaps": lambda world: [exactly(("adapter", "result"), world.traffic.swaps)],
    "Loading an adapter, p95": lambda world: [Shows(("tier",), {("disk",): (0.01, 30.0)})],
    "Adapters in the engine": lambda world: [exactly(("state",), Counter((state,) for state in world.states.values()))],
}
DRIFT: dict[str, Callable[[World], list[Shows]]] = {
    "Evidence, as a part of the threshold": lambda world: [
        close((*VERSION, "signal"), {
            key: numbers["log_evidence"] / numbers["log_threshold"] for key, numbers in world.drift.items()
        })
    ],
    "Evidence over time": lambda world: [
        close((*VERSION, "signal"), of_drift(world, "log_evidence")),
        close((), {ONE: max(of_drift(world, "log_threshold").values())}),
    ],
    "Effect": lambda world: [close((*VERSION, "signal", "stat"), world.effects)],
    "What moved most": lambda world: [
        close((*VERSION, "signal", "stat"), {key: abs(value) for key, value in world.effects.items()}, some=True)
    ],
    "Samples": lambda world: [
        exactly((*VERSION, "signal"), world.rate(of_drift(world, "samples")))
    ],
    "Reference": lambda world: [exactly((*VERSION, "signal"), of_drift(world, "reference_requests"))],
    "Alarms": lambda world: [exactly((*VERSION, "signal"), of_drift(world, "alarms"))],
}  # fmt: skip
SWAP: dict[str, Callable[[World], list[Shows]]] = {
    "Verdict: evidence against the new version": lambda world: [
        close(("version", "check"), world.canary), close(("version",), {("v2",): world.limit}),
    ],
    "Requests until it is proved": lambda world: [
        replace(exactly(("version", "bound"), world.to_proof), absent=not world.to_proof)
    ],
    "Rolled back": rolled_back,
    "Requests": lambda world: sides(
        world, lambda version: one(world.count(of_side(version))[ONE] / world.window)
    ),
    "Errors": lambda world: sides(world, lambda version: one(share_failed(world, of_version)["calm", version])),
    **{
        f"First token, p{q}": lambda world: sides(
            world, lambda version: between(world, (), side_answered(version), FIRST_TOKEN_SECONDS)
        )
        for q in (50, 95)
    },
    "Between tokens, p50": lambda world: [same((), [ONE], 0.5, known_backend.GAP, INTER_TOKEN_SECONDS)] * 2,
    "Between tokens, p95": lambda world: [same((), [ONE], 0.95, known_backend.GAP, INTER_TOKEN_SECONDS)] * 2,
    "Tokens of an answer": lambda world: sides(
        world, lambda version: side_share(world, version, lambda sent: sent.generated)
    ),
    "Answers cut at max_tokens": lambda world: sides(
        world, lambda version: side_share(world, version, lambda sent: sent.finish == "length")
    ),
    "Feedback": lambda world: sides(
        world,
        lambda version: exactly(
            ("rating",),
            world.rate({
                (rating,): count for (_, rated, rating), count in world.traffic.ratings.items() if rated == version
            }),
        ),
    ),
}  # fmt: skip
ENGINE: dict[str, Callable[[World], list[Shows]]] = {
    "Waiting for a seat": lambda world: [
        # A line of a batch may stand behind the clients.
        Shows((), {ONE: (sum(world.waiting.values()), sum(world.waiting.values()) + 1)}, held=True),
        exactly(("adapter", "tenant"), world.waiting, held=True),
    ],
    "Longest wait now": lambda world: [
        Shows(("adapter", "tenant"), dict.fromkeys(world.waiting, (world.held_up, 600.0)), held=True)
    ],
    "Time in the queue": lambda world: [waited(world, (), lambda sent: ONE) for _ in QUANTILES],
    "Refused": lambda world: [
        exactly(
            ("adapter", "tenant"),
            world.rates(lambda sent: (sent.adapter, sent.tenant) if sent.failure == "overloaded" else None),
        )
    ],
    "Answered with 429": lambda world: [
        one(world.total(lambda sent: sent.failure == "overloaded") / world.window),
        one(world.total(lambda sent: sent.status == 429 and not sent.failure) / world.window),
    ],
    "KV cache": lambda world: [exactly(("model_name", "engine"), {("base", "0"): known_backend.KV_CACHE})],
    "Batch and its queue": lambda world: [one(SEATS, held=True), one(known_backend.WAITING_INSIDE)],
    "Time in the engine's queue": gaps_everywhere(known_backend.QUEUE, ENGINE_QUEUE_SECONDS),
    "Prefix cache": lambda world: [one(known_backend.HITS / known_backend.QUERIES)],
    "Preemptions": lambda world: [one(known_backend.PREEMPTIONS / world.window)],
    "Tokens": lambda world: [
        one(sum(sent.prompt for sent in world.computed) / world.window),
        one(sum(sent.generated for sent in world.computed) / world.window),
    ],
    "Tokens of a step": lambda world: [
        one(sum(sent.prompt + sent.generated for sent in world.computed) / len(world.computed))
    ],
    "Memory": lambda world: [exactly(("model",), {("base",): known_backend.MEMORY})],
    "Restarts": lambda world: [exactly(("model",), {("base",): world.traffic.restarts})],
    "Phase": lambda world: [exactly(("model", "phase"), {("base", "ready"): 1})],
    "Prompt lengths": lambda world: [buckets(world, lambda sent: sent.prompt)],
    "Answer lengths": lambda world: [buckets(world, lambda sent: sent.generated)],
    "Prefill time": lambda world: [
        same((), [ONE], q, known_backend.PREFILL, known_backend.PHASE_SECONDS) for q in QUANTILES
    ],
    "Decode time": lambda world: [
        same((), [ONE], q, known_backend.DECODE, known_backend.PHASE_SECONDS) for q in QUANTILES
    ],
    "GPU use": lambda world: [of_gpu(known_backend.GPU["GPU_UTIL"] / 100)],
    "GPU memory": lambda world: [
        of_gpu(known_backend.GPU["FB_USED"] / (known_backend.GPU["FB_USED"] + known_backend.GPU["FB_FREE"]))
    ],
    "GPU power": lambda world: [of_gpu(known_backend.GPU["POWER_USAGE"])],
    "GPU temperature": lambda world: [of_gpu(known_backend.GPU["GPU_TEMP"])],
}
ECHO = ("echo", "v1")
QUALITY: dict[str, Callable[[World], list[Shows]]] = {
    "Golden score by version": lambda world: [
        exactly(VERSION, {ECHO: GOLDEN_SCORE}),
        close((*VERSION, "bound"), {(*ECHO, bound): world.golden[bound] for bound in ("low", "high")}),
    ],
    "Golden score of what is live": lambda world: [
        exactly(("adapter", "set"), {("echo", world.golden_set[:12]): GOLDEN_SCORE})
    ],
    "Scores now": lambda world: [
        close((*VERSION, "bound"), {(*ECHO, bound): world.golden[bound] for bound in ("low", "score", "high")})
    ],
    "Cases without a score": lambda world: [exactly(VERSION, {ECHO: 0})],
    "Cases asked, by result": lambda world: [
        exactly((*VERSION, "result"), {(*ECHO, result): count for result, count in GOLDEN_RESULTS.items()})
    ],
    "Since the last answer": lambda world: [Shows(VERSION, {ECHO: (0.0, world.window)})],
    "Runs that failed": lambda world: [exactly(("adapter",), {("echo",): 0})],
    "Agreement with the live version": lambda world: [
        of_shadow(world, lambda row: {(part,): row[f"{part}_agreement"] for part in ("exact", "prefix", "edit")},
                  "measure")
    ],
    "Length against the live version": lambda world: [of_shadow(world, lambda row: {(): row["length_ratio"]})],
    "Compared": lambda world: [
        Shows((*VERSION, "sampling"), {
            ("echo", "v2", row["sampling"]): (0.0, row["requests"] / world.window + 1e-6) for row in world.shadow
        })
    ],
    "Judge's grades": lambda world: [
        of_shadow(world, lambda row: {(answer,): known_backend.GRADE for answer in ("live", "shadow")}, "answer")
    ],
}  # fmt: skip
USAGE: dict[str, Callable[[World], list[Shows]]] = {
    "Tokens by kind": lambda world: [
        Shows(("kind",), {
            ("prompt",): born(world, lambda sent: ONE, lambda sent: sent.prompt).ranges[ONE],
            ("generated",): born(world, lambda sent: ONE, lambda sent: sent.generated).ranges[ONE],
        })
    ],
    "Engine time by tenant": lambda world: [born(world, lambda sent: (sent.tenant,), engine_seconds, by=("tenant",))],
    "Cost an hour": lambda world: [
        born(world, lambda sent: (sent.adapter, sent.tenant), lambda sent: 3600 * cost(sent), by=("adapter", "tenant"))
    ],
    "Is the engine busy": lambda world: [
        exactly(("model", "use"), {("base", "clients"): sum(map(engine_seconds, world.computed)) / world.window})
    ],
    "Languages": lambda world: [exactly(("adapter", "language"), {
        (adapter, "en"): 1 for (adapter,) in world.count(lambda sent: (sent.adapter,) if sent.reached else None)
    })],
    "Problems of prompts": lambda world: [exactly(("adapter", "problem"), {})],
    "Personal data": lambda world: [
        born(world, lambda sent: ("zeta/slow", "email") if sent.tenant == "zeta" else None,
             lambda sent: sent.reached, by=("adapter", "kind"))
    ],
    "Refused answers": lambda world: [exactly(("adapter",), {})],
}  # fmt: skip
BATCHES: dict[str, Callable[[World], list[Shows]]] = {
    "Lines left": lambda world: [one(len(HELD), held=True)],
    "Age of the oldest batch": lambda world: [Shows((), {ONE: (world.held_up, 600.0)}, held=True)],
    "Lines by result": lambda world: [exactly(("result",), world.rate(of_lines(world)))],
    "Lines that failed": lambda world: [one(world.traffic.lines["failed"] / world.traffic.lines.total())],
    "Open batches": lambda world: [exactly(("status",), {("in_progress",): 1}, held=True)],
    "Batches that ended": lambda world: [exactly(("status",), {("completed",): world.traffic.batches})],
    "Fine-tuning jobs": lambda world: [exactly(("status",), {}), one(0)],
    "Jobs that ended": lambda world: [exactly(("status",), {})],
    "Tokens trained": lambda world: [one(0)],
    "Training, and suspended": lambda world: [one(0), one(0)],
    "Where loops are": lambda world: [exactly(("adapter", "phase"), {("kept", "waiting"): 1})],
    "Tries that ended": lambda world: [exactly(("adapter", "outcome"), {("kept", "rejected"): world.traffic.tries})],
    "Candidates that had forgotten": lambda world: [exactly(("adapter",), {("kept",): 0})],
    "Tries in a row for nothing": lambda world: [exactly(("adapter",), {("kept",): world.traffic.tries})],
    "Every loop is stopped": lambda world: [one(0)],
    "Files": lambda world: [one(len(world.files))],
    "Size of the files": lambda world: [one(sum(world.files))],
    "Flagged and refused": lambda world: [
        of_guards(world, ("adapter", "side", "result"), lambda key: key if key[2] in ("flagged", "refused") else None)
    ],
    "Share flagged or refused": lambda world: [share_flagged(world)],
    "Without a verdict": lambda world: [
        of_guards(world, ("adapter", "side", "result"), lambda key: key if key[2] == "error" else None)
    ],
    "Looked at": lambda world: [of_guards(world, ("adapter", "side"), lambda key: key[:2])],
}  # fmt: skip
PANELS = {
    "loradock-overview": OVERVIEW,
    "loradock-adapters": ADAPTERS,
    "loradock-drift": DRIFT,
    "loradock-swap": SWAP,
    "loradock-quality": QUALITY,
    "loradock-engine": ENGINE,
    "loradock-usage": USAGE,
    "loradock-batches": BATCHES,
}


def of_lines(world: World) -> Values:
    return {(result,): count for result, count in world.traffic.lines.items()}


def of_guards(world: World, by: Key, key: Callable[[Key], Key | None]) -> Shows:
    """A rate; what came before the first scrape may be missing."""
    every, early = defaultdict[Key, float](float), defaultdict[Key, float](float)
    for counts, sums in ((world.traffic.guarded, every), (world.traffic.early_guarded, early)):
        for labels, count in counts.items():
            if (of := key(labels)) is not None:
                sums[of] += count / world.window
    return Shows(by, {of: (count - early[of] - 1e-6, count + 1e-6) for of, count in every.items()})


def share_flagged(world: World) -> Shows:
    """Of what got a verdict."""
    ranges: dict[Key, tuple[float, float]] = {}
    for adapter, side in {key[:2] for key in world.traffic.guarded}:
        early = world.traffic.early_guarded[adapter, side, "passed"]
        flagged = sum(world.traffic.guarded[adapter, side, result] for result in ("flagged", "refused"))
        passed = world.traffic.guarded[adapter, side, "passed"]
        ranges[adapter, side] = (flagged / (flagged + passed) - 1e-6, flagged / (flagged + passed - early) + 1e-6)
    return Shows(("adapter", "side"), ranges)


def of_gpu(value: float) -> Shows:
    return exactly(("gpu",), {("0",): value})


def of_shadow(world: World, numbers: Callable[[Mapping[str, Any]], Values], *by: str) -> Shows:
    """Of each kind of sampling, as the API says it."""
    rows = {("echo", "v2", row["sampling"], *of): value for row in world.shadow for of, value in numbers(row).items()}
    return close((*VERSION, "sampling", *by), rows)


def buckets(world: World, tokens: Callable[[Sent], int]) -> Shows:
    """How many requests have at most so many tokens."""
    lengths = Counter(map(tokens, world.computed))
    bounds = (*known_backend.LENGTHS, math.inf)
    return exactly(("le",), {(floatToGoString(bound),): known_backend.below(lengths, bound) for bound in bounds})


def engine_seconds(sent: Sent) -> float:
    return known_backend.ENGINE_SECONDS * sent.reached


def cost(sent: Sent) -> float:
    return PRICE.cost(sent.prompt, 0, sent.generated, engine_seconds(sent))


def born(world: World, key: Callable[[Sent], Key | None], number: Callable[[Sent], float], *, by: Key = ()) -> Shows:
    """A rate of what was used, which has no series before its first event: Prometheus misses what came before it."""
    every, early = defaultdict[Key, float](float), defaultdict[Key, float](float)
    traffic = world.traffic
    for sents, first in ((traffic.sent, traffic.early), (traffic.inside, traffic.early_inside)):
        for at, sent in enumerate(sents):
            if (of := key(sent)) is not None:
                every[of] += number(sent)
                early[of] += number(sent) * (at < first)
    slack, window = 1e-6, world.window
    ranges = {of: ((every[of] - early[of]) / window - slack, every[of] / window + slack) for of in every if every[of]}
    return Shows(by, ranges)


def close(by: Key, values: Values, *, some: bool = False) -> Shows:
    """What the API rounds to four digits."""
    return Shows(by, {key: (value - 1e-4, value + 1e-4) for key, value in values.items()}, some=some)


def wrong(shows: Shows, samples: Sequence[Sample]) -> list[str]:
    """In what the samples of a query are not what they should be."""
    values: dict[Key, float] = {}
    for sample in samples:
        labels, value = sample["metric"], float(sample["value"][1])
        if value == value:
            values[tuple(labels.get(name, "") for name in shows.by)] = value
    lines = []
    for key, (low, high) in shows.ranges.items():
        if key not in values:
            if not (shows.some or low <= 0 <= high):
                lines.append(f"{key} is missing, not {low:g} to {high:g}")
        elif not low <= values[key] <= high:
            lines.append(f"{key} is {values[key]:.9g}, not {low:.9g} to {high:.9g}")
    strangers = {key: value for key, value in values.items() if key not in shows.ranges and value}
    return lines + [f"nobody sent {key}, which is {value:g}" for key, value in strangers.items()]
