"""What is run when: calibration, warm-up, then rounds that alternate A B B A and are paired one by one.

Two servers on one machine take turns in one run because the machine drifts: heat, neighbours, page cache. Each pair
sees nearly the same machine, so the ratio of a pair means more than a ratio of averages. A pair that others disturbed
is run again, a bounded number of times, and stays in the record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal, Protocol

import msgspec

from serve.client.bench.load import PATHS, Answer, Level, Server, Settings, press, watch_answer
from serve.client.bench.prompts import Prompts, Scale
from serve.client.bench.watch import Use, Watch, is_local, listeners, machine
from serve.client.bench.wire import Address, WireError

_PREFLIGHT_NAMES = 32
_WARMUP_NAMES = 64
_SETTLE_S = 0.2


class CannotBench(Exception):
    """The servers are not there, or do not answer: nothing can be measured."""


@dataclass(slots=True)
class Round:
    """One round on one server, with everything raw."""

    server: str
    streams: int | None
    rate: float | None
    pair: int
    attempt: int
    wall_s: float
    client_cpu_s: float
    use: Use | None
    disturbed: bool
    answers: list[Answer]

    @property
    def level(self) -> Level:
        return Level(self.streams, self.rate)


@dataclass(slots=True)
class Result:
    """A whole run."""

    started: str
    machine: dict[str, object]
    settings: Settings
    servers: list[dict[str, Any]]
    levels: list[Level]
    prompt_run: str
    scale: Scale
    rounds: list[Round] = field(default_factory=list)
    warmup_errors: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0


class Observer(Protocol):
    """Whoever shows the progress."""

    def begins(self, what: str, requests: int | None) -> None: ...

    def answered(self, answer: Answer) -> None: ...

    def ended(self, round_: Round) -> None: ...

    def says(self, sentence: str) -> None: ...


async def find(
    label: str,
    address: Address,
    names: Sequence[str],
    adapters: Sequence[str],
    dialect: Literal["auto", "openai", "llama.cpp"] = "auto",
    extra: dict[str, Any] | None = None,
) -> Server:
    """The server at `address`, after asking it what it serves."""
    models = await _models(address)
    if dialect == "auto":
        dialect = "llama.cpp" if any(model.get("owned_by") == "llamacpp" for model in models) else "openai"
    asked = tuple(adapters or names)
    if not asked:
        if not models:
            raise CannotBench(f"{address.url} lists no model; name one with --model")
        asked = (str(models[0]["id"]),)
    return Server(label, address, asked, dialect, bool(adapters), extra or {})


async def bench(
    servers: Sequence[Server],
    levels: Sequence[Level],
    settings: Settings,
    observer: Observer,
    watch: Watch | None = None,
) -> Result:
    """Measure one server, or two against each other."""
    begin = perf_counter()
    prompts = Prompts(settings.seed)
    roots = {server.label: _processes(server.address) for server in servers}
    watch = watch or Watch(roots)
    for server in servers:
        observer.begins(f"asking {server.label} for a first answer", None)
        await _preflight(server, settings, prompts)
    scale = await _calibrate(servers[0], settings, prompts)
    if not scale.measured:
        observer.says(f"{servers[0].label} reports no token usage: prompt lengths and token counts are estimates")
    result = Result(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        settings=settings,
        servers=[_describe(server, watch, roots[server.label]) for server in servers],
        levels=list(levels),
        prompt_run=prompts.run,
        scale=scale,
    )
    session = _Session(servers, settings, prompts, scale, watch, observer, result)
    for level in levels:
        await session.measure(level)
    result.seconds = round(perf_counter() - begin, 1)
    return result


@dataclass(slots=True)
class _Session:
    servers: Sequence[Server]
    settings: Settings
    prompts: Prompts
    scale: Scale
    watch: Watch
    observer: Observer
    result: Result

    async def measure(self, level: Level) -> None:
        for server in self.servers:
            await self._warm_up(server, level)
        reruns = self.settings.rounds if self.settings.reruns is None else self.settings.reruns
        for pair in range(self.settings.rounds):
            attempt = 0
            while True:
                rounds = [await self._round(server, level, pair, attempt) for server in self._turns(pair)]
                self.result.rounds.extend(rounds)
                if not any(round_.disturbed for round_ in rounds):
                    break
                if reruns == 0:
                    self.observer.says(f"round {pair + 1} at {level} was disturbed, and no rerun is left")
                    break
                reruns -= 1
                attempt += 1
                self.observer.says(f"round {pair + 1} at {level} was disturbed ({_who(rounds)}): running it again")

    def _turns(self, pair: int) -> Sequence[Server]:
        return self.servers if pair % 2 == 0 else self.servers[::-1]

    async def _warm_up(self, server: Server, level: Level) -> None:
        settings = self.settings
        count = settings.warmup
        if count is None:
            count = max(level.streams or 4, min(len(server.names), _WARMUP_NAMES))
        if count == 0:
            return
        warm = Level(streams=min(level.streams or 4, count))
        self.observer.begins(f"warming up {server.label} for {level}", count)
        few = replace(settings, requests=count, duration=None)
        load = await press(server, warm, few, self.prompts, self.scale, f"warm/{level}", self.observer.answered)
        errors = Counter(answer.error for answer in load.answers if answer.error)
        if errors.total() == len(load.answers):
            worst = load.answers[0]
            raise CannotBench(f"{server.address.url} failed all {count} warm-up requests: {worst.message}")
        if errors:
            self.result.warmup_errors[f"{server.label}, {level}"] = dict(errors)

    async def _round(self, server: Server, level: Level, pair: int, attempt: int) -> Round:
        settings = self.settings
        await asyncio.sleep(_SETTLE_S)
        title = f"round {pair + 1}/{settings.rounds} on {server.label}, {level}"
        self.observer.begins(title, settings.requests)
        before = self.watch.snapshot()
        key = f"{level}/{pair}/{attempt}"
        load = await press(server, level, settings, self.prompts, self.scale, key, self.observer.answered)
        after = self.watch.snapshot()
        use = self.watch.between(before, after, server.label) if self.watch.works else None
        round_ = Round(
            server=server.label,
            streams=level.streams,
            rate=level.rate,
            pair=pair,
            attempt=attempt,
            wall_s=load.wall_s,
            client_cpu_s=load.client_cpu_s,
            use=use,
            disturbed=use is not None and use.disturbed(settings.disturbed_above),
            answers=load.answers,
        )
        self.observer.ended(round_)
        return round_


async def _models(address: Address) -> list[dict[str, Any]]:
    """What /v1/models lists; an empty list from a server that has no such route."""
    try:
        async with asyncio.timeout(30):
            connection = await address.connect()
            reply = await connection.exchange(address.get("/v1/models"))
        connection.close()
    except TimeoutError as silent:
        raise CannotBench(f"{address.url} accepts connections and does not answer within 30 s") from silent
    except WireError as broken:
        raise CannotBench(f"{broken}; is the server running?") from broken
    if reply.status in (401, 403):
        raise CannotBench(f"{address.url} refuses this key ({reply.status}); give one with --api-key (--vs-api-key)")
    try:
        listed = msgspec.json.decode(bytes(reply.body))["data"] if reply.status == 200 else []
        return [model for model in listed if isinstance(model, dict) and "id" in model]
    except (msgspec.MsgspecError, KeyError, TypeError) as odd:
        raise CannotBench(f"{address.url}/v1/models does not answer like an OpenAI-compatible server") from odd


async def _one(server: Server, settings: Settings, which: int, prompt: str) -> Answer:
    answer = Answer(0, server.names[which], 0.0)
    body = msgspec.json.encode(server.body(settings, which, prompt))
    begin = perf_counter()
    request = server.address.post(PATHS[settings.endpoint], body)
    connection = await watch_answer(server.address, request, answer, begin, settings.timeout)
    if connection is not None:
        connection.close()
    return answer


async def _preflight(server: Server, settings: Settings, prompts: Prompts) -> None:
    """Ask every name once, so that a wrong one is told before an hour of rounds and not after."""
    for which, name in enumerate(server.names[:_PREFLIGHT_NAMES]):
        short = replace(settings, max_tokens=min(4, settings.max_tokens))
        answer = await _one(server, short, which, prompts.text(server.label, "preflight", which, 8))
        if answer.error is not None:
            raise CannotBench(f"{server.address.url} does not answer for model {name!r}: {answer.message}")


async def _calibrate(server: Server, settings: Settings, prompts: Prompts) -> Scale:
    """How many tokens a word is, from the server's own counts for a short and a longer prompt."""
    short = replace(settings, max_tokens=1)
    long = max(32, min(256, settings.prompt_tokens // 2))
    counts = []
    for index, words in enumerate((8, long)):
        answer = await _one(server, short, 0, prompts.text(server.label, "calibrate", index, words))
        if answer.error is not None or answer.counted_by != "usage" or not answer.prompt_tokens:
            return Scale()
        counts.append(answer.prompt_tokens)
    per_word = (counts[1] - counts[0]) / (long - 8)
    if per_word <= 0:
        return Scale()
    return Scale(fixed=round(counts[0] - 8 * per_word, 2), per_word=round(per_word, 3), measured=True)


def _processes(address: Address) -> frozenset[int]:
    return listeners(address.port) if is_local(address.host) else frozenset()


def _describe(server: Server, watch: Watch, roots: frozenset[int]) -> dict[str, Any]:
    now = watch.snapshot()
    tree = sorted(now.tree(roots))
    return {
        "label": server.label,
        "url": server.address.url,
        "models": list(server.names),
        "dialect": server.dialect,
        "processes": [{"pid": pid, "name": now.processes[pid].name} for pid in tree],
    }


def _who(rounds: Sequence[Round]) -> str:
    worst = max((round_.use for round_ in rounds if round_.use), key=lambda use: use.disturbance)
    names = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in worst.busiest)
    return f"{worst.disturbance:.0%} of a core{': ' + names if names else ''}"
