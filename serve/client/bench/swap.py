"""Proof of a swap: versions change places under streams, and every answer is held against what its version says alone.

Before the load each version answers each prompt by its pinned name, greedily: the reference. Under load an answer is

    wrong   its text is not what the version that signed it (the `model` field) says, and not what another one says
    mixed   it was signed by two versions, or begins as one and goes on as another
    stale   it was asked after a promote had been acknowledged, and another version answered

The same prompts are asked over and over, so that a prefix cache which confused two versions would show.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import msgspec

from serve.client.bench.load import Answer, Stream
from serve.client.bench.wire import Address, Connection, WireError
from serve.errors import BadRequest, LoradockError

CHAT = "/v1/chat/completions"
PROMPTS = (
    "What is the capital of France?",
    "Tell me about the sea.",
    "How does a bicycle work?",
    "Why is the sky blue?",
    "Name a good book and say why.",
    "What should I cook tonight?",
    "Explain gravity to a child.",
    "Who painted the Mona Lisa?",
)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Plan:
    """What to prove: `swaps` promotes of `name` between `versions`, under `streams` streams."""

    name: str
    versions: tuple[int, ...]
    streams: int = 16
    swaps: int = 20
    every: float = 3.0
    max_tokens: int = 64
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Flip:
    """One promote, from when it was asked to when its answer came; seconds since the run began."""

    asked: float
    acknowledged: float
    version: int


@dataclass(slots=True)
class Spoken:
    """One answer under load; times in seconds since the run began."""

    prompt: int
    asked: float
    live: int
    first: float | None = None
    ended: float = 0.0
    models: set[str] = field(default_factory=set)
    text: str = ""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen. Gaps are inter-token latencies in milliseconds, `ratio` is during swaps over without.

    `promoting` is what of the swaps' phase lies between a promote's request and a second after its answer.
    """

    swaps: int
    answers: int
    answers_per_version: dict[str, int]
    across_a_swap: int
    failed: int
    mixed: int
    wrong: int
    stale: int
    promote_ms_median: float
    promote_ms_max: float
    steady_p50_ms: float
    steady_p99_ms: float
    swapping_p50_ms: float
    swapping_p99_ms: float
    promoting_p99_ms: float
    ratio_p99: float
    gaps: tuple[int, int, int]
    errors: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not (self.failed or self.mixed or self.wrong or self.stale)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


class _Listener(Stream):
    """A stream that remembers who signed it and what it said."""

    __slots__ = ("_spoken", "_tail")

    def __init__(self, answer: Answer, begin: float, spoken: Spoken) -> None:
        super().__init__(answer, begin)
        self._spoken = spoken
        self._tail = b""

    def feed(self, data: bytes, now: float) -> None:
        before = len(self._answer.gaps_ms)
        super().feed(data, now)
        if len(self._answer.gaps_ms) > before:
            self._spoken.gaps.append((now - self._begin, self._answer.gaps_ms[-1]))
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                chunk = msgspec.json.decode(line[6:])
                if "model" in chunk:
                    self._spoken.models.add(chunk["model"])
                for choice in chunk.get("choices", ()):
                    self._spoken.text += (choice.get("delta") or {}).get("content") or ""


async def prove(address: Address, plan: Plan, say: Callable[[str], None] = lambda line: None) -> Proof:
    """The whole proof: references, a steady phase, the swaps, a steady phase again."""
    run = _Run(address, plan)
    ids = await run.look_up()
    say(f"asking {len(plan.versions)} versions {len(PROMPTS)} prompts each, alone")
    await run.learn()
    await run.promote(plan.versions[0])
    async with asyncio.TaskGroup() as group:
        users = [group.create_task(run.user(number)) for number in range(plan.streams)]
        try:
            # The first prompts all come at once, which no later moment repeats.
            while len(run.spoken) < 2 * plan.streams:
                await asyncio.sleep(0.1)
            warm = run.now()
            steady = max(plan.every * plan.swaps / 4, 2 * plan.every)
            say(f"{plan.streams} streams, no swap for {steady:.0f} s")
            await asyncio.sleep(steady)
            began = run.now()
            turns = itertools.cycle(plan.versions[1:] + plan.versions[:1])
            for number, version in enumerate(itertools.islice(turns, plan.swaps)):
                await run.promote(version)
                say(f"swap {number + 1} of {plan.swaps}: {plan.name}@v{version} is live")
                await asyncio.sleep(plan.every)
            ended = run.now()
            say(f"{plan.streams} streams, no swap for {steady:.0f} s")
            await asyncio.sleep(steady)
        finally:
            run.stopping = True
        await asyncio.gather(*users)
    return run.judge(ids, warm, began, ended)


class _Run:
    def __init__(self, address: Address, plan: Plan) -> None:
        self.address = address
        self.plan = plan
        self.begin = perf_counter()
        self.stopping = False
        self.live = plan.versions[0]
        self.spoken: list[Spoken] = []
        self.references: dict[tuple[int, int], str] = {}
        self.flips: list[Flip] = []

    def now(self) -> float:
        return perf_counter() - self.begin

    async def look_up(self) -> dict[int, str]:
        """Version -> engine id; the adapter must have all versions of the plan."""
        body = await self._call("GET", f"/v1/adapters/{self.plan.name}")
        ids = {version["version"]: version["id"] for version in body["versions"]}
        missing = [str(version) for version in self.plan.versions if version not in ids]
        if missing:
            have = ", ".join(map(str, ids))
            raise BadRequest(f"{self.plan.name} has no version {', '.join(missing)}: it has {have}")
        return ids

    async def learn(self) -> None:
        for version in self.plan.versions:
            for prompt in range(len(PROMPTS)):
                spoken = await self._ask(f"{self.plan.name}@v{version}", prompt, version)
                if spoken.error:
                    raise BadRequest(f"{self.plan.name}@v{version} did not answer alone: {spoken.error}")
                self.references[version, prompt] = spoken.text
        for prompt in range(len(PROMPTS)):
            if len({self.references[version, prompt] for version in self.plan.versions}) < len(self.plan.versions):
                raise BadRequest(
                    f"two of the versions answer {PROMPTS[prompt]!r} alike, so an answer can't tell which one gave it: "
                    "take versions that were trained to differ"
                )

    async def promote(self, version: int) -> None:
        asked = self.now()
        await self._call("POST", f"/v1/adapters/{self.plan.name}/promote", {"version": version})
        self.live = version
        self.flips.append(Flip(asked, self.now(), version))

    async def user(self, number: int) -> None:
        for turn in itertools.count(number):
            if self.stopping:
                return
            self.spoken.append(await self._ask(self.plan.name, turn % len(PROMPTS), self.live))

    def judge(self, ids: dict[int, str], warm: float, began: float, ended: float) -> Proof:
        """Hold every answer against the references."""
        versions = {ids[version]: version for version in self.plan.versions}
        failed = mixed = wrong = stale = across = 0
        per_version = dict.fromkeys(versions, 0)
        errors: list[str] = []
        for spoken in self.spoken:
            if spoken.error:
                failed += 1
                errors.append(spoken.error)
                continue
            across += any(spoken.asked < flip.acknowledged < spoken.ended for flip in self.flips)
            signed = {versions.get(model, 0) for model in spoken.models}
            if len(signed) != 1:
                mixed += 1
                continue
            version = signed.pop()
            if version in self.plan.versions:
                per_version[ids[version]] += 1
            if spoken.text != self.references.get((version, spoken.prompt)):
                if self._begins_as_another(spoken, version):
                    mixed += 1
                else:
                    wrong += 1
                errors.append(f"v{version} said {spoken.text[:60]!r} to {PROMPTS[spoken.prompt]!r}")
            elif version not in self._allowed(spoken):
                stale += 1
        gaps = [(at, gap) for answer in self.spoken for at, gap in answer.gaps if at >= warm]
        steady = [gap for at, gap in gaps if not began <= at <= ended]
        during = [(at, gap) for at, gap in gaps if began <= at <= ended]
        windows = [(flip.asked, flip.acknowledged + 1) for flip in self.flips[1:]]
        swapping = [gap for _, gap in during]
        promoting = [gap for at, gap in during if any(asked <= at <= until for asked, until in windows)]
        calm, busy = percentile(steady, 99), percentile(swapping, 99)
        promotes = [flip.acknowledged - flip.asked for flip in self.flips[1:]] or [0.0]
        return Proof(
            swaps=len(self.flips) - 1,
            answers=len(self.spoken),
            answers_per_version=per_version,
            across_a_swap=across,
            failed=failed,
            mixed=mixed,
            wrong=wrong,
            stale=stale,
            promote_ms_median=round(statistics.median(promotes) * 1000, 1),
            promote_ms_max=round(max(promotes) * 1000, 1),
            steady_p50_ms=percentile(steady, 50),
            steady_p99_ms=calm,
            swapping_p50_ms=percentile(swapping, 50),
            swapping_p99_ms=busy,
            promoting_p99_ms=percentile(promoting, 99),
            ratio_p99=round(busy / calm, 3) if calm else 0.0,
            gaps=(len(steady), len(swapping), len(promoting)),
            errors=tuple(dict.fromkeys(errors))[:10],
        )

    def _allowed(self, spoken: Spoken) -> set[int]:
        """What was live when it was asked, and what was being made live until it began to answer."""
        first = spoken.first or spoken.ended
        meanwhile = {flip.version for flip in self.flips if flip.asked <= first and flip.acknowledged >= spoken.asked}
        return {spoken.live} | meanwhile

    def _begins_as_another(self, spoken: Spoken, version: int) -> bool:
        head = spoken.text[: max(8, len(spoken.text) // 4)]
        same = [(other, text) for (other, prompt), text in self.references.items() if prompt == spoken.prompt]
        others = [text for other, text in same if other != version]
        return any(text.startswith(head) or spoken.text[-12:] in text for text in others)

    async def _ask(self, model: str, prompt: int, live: int) -> Spoken:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPTS[prompt]}],
            "max_tokens": self.plan.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        spoken = Spoken(prompt, self.now(), live)
        answer = Answer(0, model, spoken.asked)
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self.plan.timeout):
                connection = await self.address.connect()
                listener = _Listener(answer, self.begin, spoken)
                reply = await connection.exchange(self.address.post(CHAT, _encode(body)), listener.feed)
                if reply.status == 200:
                    listener.close()
                else:
                    answer.error = f"http {reply.status}: {bytes(reply.body[:200]).decode(errors='replace')}"
        except TimeoutError:
            answer.error = f"no complete answer within {self.plan.timeout:g} s"
        except WireError as broken:
            answer.error = f"{broken.kind}: {broken}"
        finally:
            if connection is not None:
                connection.close()
        spoken.error = answer.error
        spoken.first = answer.first
        spoken.ended = self.now()
        return spoken

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = await self.address.connect()
        try:
            request = self.address.get(path) if method == "GET" else self.address.post(path, _encode(body))
            reply = await connection.exchange(request)
        finally:
            connection.close()
        answer = msgspec.json.decode(bytes(reply.body) or b"{}")
        if reply.status >= 400:
            raise _Refused(answer.get("error", {}).get("message") or f"{path} answered {reply.status}")
        return answer


class _Refused(LoradockError):
    """The server's own sentence."""


def percentile(values: list[float], share: float) -> float:
    """The `share`-th percentile in the unit of `values`, by the nearest rank; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))], 2)
