"""One round of load on one server: who asks what when, and what was seen of each answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from time import perf_counter, process_time
from typing import Any, Literal

import msgspec

from serve.client.bench.prompts import Prompts, Scale
from serve.client.bench.wire import Address, Connection, WireError

Endpoint = Literal["chat", "completions"]
PATHS: dict[str, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for; the same for every server of a run."""

    endpoint: Endpoint = "chat"
    prompt_tokens: int = 128
    max_tokens: int = 64
    shared_prefix: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    requests: int | None = None
    duration: float | None = None
    rounds: int = 5
    warmup: int | None = None
    zipf: float | None = None
    seed: int = 0
    timeout: float = 300.0
    disturbed_above: float = 0.10
    reruns: int | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """How hard to press: so many streams at a time, or so many requests a second come what may."""

    streams: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.streams} stream{'' if self.streams == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Server:
    """One endpoint, and how it wants to be asked."""

    label: str
    address: Address
    names: tuple[str, ...]
    dialect: Literal["openai", "llama.cpp"] = "openai"
    adapters: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, settings: Settings, which: int, prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.names[which],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if settings.ignore_eos:
            body["ignore_eos"] = True
        if self.dialect == "llama.cpp" and self.adapters:
            # llama.cpp knows its adapters by the order in which it was given them, not by the model's name.
            body["lora"] = [{"id": which, "scale": 1.0}]
        return body | self.extra


@dataclass(slots=True)
class Answer:
    """One request and what came of it; times in seconds since its round began, gaps in milliseconds."""

    index: int
    model: str
    due: float
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted_by: Literal["usage", "chunks"] = "chunks"
    finish: str | None = None
    gaps_ms: list[float] = field(default_factory=list)
    error: str | None = None
    message: str | None = None

    @property
    def ttft(self) -> float | None:
        """From when the request was due, so that a client that falls behind cannot flatter the server."""
        return None if self.first is None else self.first - self.due


@dataclass(slots=True)
class Load:
    """All that one round showed of the server's side and the client's own cost."""

    answers: list[Answer]
    wall_s: float
    client_cpu_s: float


@dataclass(frozen=True, slots=True)
class Mix:
    """Which of the names a request goes to: each equally often, or the k-th by 1/k^zipf."""

    count: int
    zipf: float | None
    seed: str

    def __call__(self, index: int) -> int:
        if self.zipf is None:
            return _deck(self.seed, self.count, index // self.count)[index % self.count]
        weights = _zipf(self.count, self.zipf)
        return Random(f"{self.seed}/mix/{index}").choices(range(self.count), cum_weights=weights)[0]


async def press(
    server: Server,
    level: Level,
    settings: Settings,
    prompts: Prompts,
    scale: Scale,
    round_: str,
    answered: Callable[[Answer], None] = lambda answer: None,
) -> Load:
    """Run one round and wait for its last answer."""
    mix = Mix(len(server.names), settings.zipf, f"{settings.seed}/{round_}")
    words = scale.words(settings.prompt_tokens)
    shared = round(settings.shared_prefix / scale.per_word)
    encode = msgspec.json.Encoder().encode
    begin, cpu = perf_counter(), process_time()
    answers: list[Answer] = []

    async def ask(index: int, due: float, connection: Connection | None) -> Connection | None:
        which = mix(index)
        prompt = prompts.text(server.label, round_, index, words, shared)
        request = server.address.post(PATHS[settings.endpoint], encode(server.body(settings, which, prompt)))
        answer = Answer(index, server.names[which], due)
        connection = await watch_answer(server.address, request, answer, begin, settings.timeout, connection)
        answers.append(answer)
        answered(answer)
        return connection

    if level.rate is not None:
        await _open_loop(ask, level.rate, settings, begin, round_)
    else:
        await _closed_loop(ask, level.streams or 1, settings, begin)
    end = max((answer.end for answer in answers), default=perf_counter() - begin)
    return Load(sorted(answers, key=lambda answer: answer.index), end, process_time() - cpu)


Ask = Callable[[int, float, Connection | None], Awaitable[Connection | None]]


async def _closed_loop(ask: Ask, streams: int, settings: Settings, begin: float) -> None:
    """`streams` users, each of whom asks again as soon as he has his answer."""
    pending = iter(range(settings.requests)) if settings.requests is not None else itertools.count()

    async def user() -> None:
        connection: Connection | None = None
        for index in pending:
            due = perf_counter() - begin
            if settings.duration is not None and due >= settings.duration:
                break
            connection = await ask(index, due, connection)
        if connection is not None:
            connection.close()

    async with asyncio.TaskGroup() as users:
        for _ in range(streams):
            users.create_task(user())


async def _open_loop(ask: Ask, rate: float, settings: Settings, begin: float, round_: str) -> None:
    """Requests arrive as a Poisson process, however slowly the earlier ones are answered."""
    idle: list[Connection] = []

    async def visitor(index: int, due: float) -> None:
        connection = await ask(index, due, idle.pop() if idle else None)
        if connection is not None:
            idle.append(connection)

    async with asyncio.TaskGroup() as visitors:
        for index, due in enumerate(_arrivals(rate, settings, round_)):
            await asyncio.sleep(begin + due - perf_counter())
            visitors.create_task(visitor(index, due))
    for connection in idle:
        connection.close()


def _arrivals(rate: float, settings: Settings, round_: str) -> Iterator[float]:
    clock = Random(f"{settings.seed}/{round_}/arrivals")
    due = 0.0
    for index in itertools.count():
        if settings.requests is not None and index >= settings.requests:
            return
        due += clock.expovariate(rate)
        if settings.duration is not None and due > settings.duration:
            return
        yield due


async def watch_answer(
    address: Address, request: bytes, answer: Answer, begin: float, timeout: float, connection: Connection | None = None
) -> Connection | None:
    """Send `request`, write what is seen into `answer`, and give back the connection if it can be used again."""
    answer.sent = perf_counter() - begin
    try:
        async with asyncio.timeout(timeout):
            if connection is not None and not connection.reusable:
                connection.close()
                connection = None
            fresh = connection is None
            stream = Stream(answer, begin)
            connection = connection or await address.connect()
            try:
                reply = await connection.exchange(request, stream.feed)
            except WireError as broken:
                if fresh or broken.kind != "dropped":
                    raise
                # A kept-alive connection that the server closed just as we wrote: nobody has seen the request yet.
                connection = await address.connect()
                reply = await connection.exchange(request, stream.feed)
        answer.end = perf_counter() - begin
        if reply.status != 200:
            answer.error, answer.message = f"http {reply.status}", _sentence(bytes(reply.body))
        else:
            stream.close()
    except TimeoutError:
        answer.error, answer.message = "timeout", f"no complete answer within {timeout:g} s"
    except WireError as broken:
        answer.error, answer.message = broken.kind, str(broken)
    answer.end = answer.end or perf_counter() - begin
    if connection is None or (answer.error is None and connection.reusable):
        return connection
    connection.close()
    return None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def speaks(self) -> bool:
        if self.text or self.delta is None:
            return bool(self.text)
        delta = self.delta
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Stream:
    """Reads server-sent events as they come; tokens are counted by the server's `usage`, never by chunks if it has one.

    What arrives in one read arrived at one time: a gap is the time between two reads that brought text.
    """

    __slots__ = ("_answer", "_begin", "_buffer", "_chunks", "_done", "_latest")
    _decode = staticmethod(msgspec.json.Decoder(_Chunk).decode)

    def __init__(self, answer: Answer, begin: float) -> None:
        self._answer = answer
        self._begin = begin
        self._buffer = b""
        self._latest: float | None = None
        self._chunks = 0
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        if self._buffer:
            data = self._buffer + data
        *lines, self._buffer = data.split(b"\n")
        spoke = False
        for line in lines:
            if line.startswith((b"data:", b"error:")):
                spoke = self._event(line, now) or spoke
        if not spoke:
            return
        answer = self._answer
        if self._latest is None:
            answer.first = now - self._begin
        else:
            answer.gaps_ms.append(round((now - self._latest) * 1000, 3))
        self._latest = now

    def close(self) -> None:
        """The answer has ended: was it one?"""
        answer = self._answer
        if answer.counted_by == "chunks":
            answer.output_tokens = self._chunks
        if answer.error is not None:
            return
        if not self._done and answer.finish is None:
            answer.error, answer.message = "truncated", "the stream ended without a finish reason"
        elif answer.output_tokens == 0:
            answer.error, answer.message = "empty", "the answer holds no token"

    def _event(self, line: bytes, now: float) -> bool:
        """Whether this event brought text."""
        payload = line.partition(b":")[2].strip()
        if payload == b"[DONE]":
            self._done = True
            return False
        if line.startswith(b"error:"):
            self._answer.error, self._answer.message = "stream error", _sentence(payload)
            return False
        try:
            chunk = self._decode(payload)
        except msgspec.MsgspecError as broken:
            raise WireError("malformed", f"an event of the stream is not a completion chunk: {broken}") from broken
        answer = self._answer
        if chunk.error is not None:
            answer.error, answer.message = "stream error", _sentence(payload)
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            answer.prompt_tokens = chunk.usage.prompt_tokens
            answer.output_tokens = chunk.usage.completion_tokens
            answer.counted_by = "usage"
        if not chunk.choices:
            return False
        choice = chunk.choices[0]
        answer.finish = choice.finish_reason or answer.finish
        speaks = choice.speaks
        if speaks or self._latest is not None or choice.finish_reason:
            answer.last = now - self._begin
        self._chunks += speaks
        return speaks


def _sentence(body: bytes) -> str:
    """The message in an error of OpenAI's shape, or the beginning of whatever came."""
    try:
        error = msgspec.json.decode(body)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (msgspec.MsgspecError, AttributeError):
        return body[:200].decode(errors="replace")


@lru_cache(maxsize=64)
def _deck(seed: str, count: int, turn: int) -> tuple[int, ...]:
    deck = list(range(count))
    Random(f"{seed}/deck/{turn}").shuffle(deck)
    return tuple(deck)


@lru_cache(maxsize=8)
def _zipf(count: int, exponent: float) -> tuple[float, ...]:
    return tuple(itertools.accumulate((rank + 1) ** -exponent for rank in range(count)))
