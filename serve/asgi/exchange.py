"""Watches an answer go by, and how the engine made it, and offers an Exchange; never waits, never raises.

Two places are watched. `Tap` stands between vLLM's app and the socket: status, first byte, last byte. `Watch` is what
the backend finds in `watching` when it begins a sequence for that very request: it leaves a `Sequence` there, which is
read when the answer has ended. So a request that does not stream is seen token by token too, and nothing is parsed.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from starlette.types import Message, Scope, Send

from serve.asgi.answer_headers import labelled, version_tag
from serve.asgi.fast_stream import FastStream
from serve.asgi.trace_context import RequestTrace
from serve.errors import ClientLeft, DeadlineExceeded, EngineUnavailable, LoradockError, Overloaded
from serve.names import MIXED, short_name

log = logging.getLogger(__name__)

# What is counted when the client left before anything was answered.
LEFT = 499

# Of a longer body only the tokens of its prompt are looked at.
QUESTION_BYTES = 256 << 10
# vLLM's words where a prompt is longer than the model's context.
_OVER_CONTEXT = re.compile(rb"maximum (context|model) length")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


@dataclass(frozen=True, slots=True)
class RequestId:
    """`own` is made here for each request, and no two have the same. `client` is what the client calls it, "" if it
    gave it no name: several requests may have it, of several clients too."""

    own: str
    client: str = ""

    @property
    def echo(self) -> str:
        """What the answer's x-request-id says."""
        return self.client or self.own


def identified(scope: Scope) -> tuple[Scope, RequestId]:
    """The request with an id of our own in its x-request-id header, by which the engine knows it too."""
    ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
    client = ids[0].decode() if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]) else ""
    id = RequestId(uuid.uuid4().hex, client)
    rest = [header for header in scope["headers"] if header[0] != b"x-request-id"]
    return {**scope, "headers": [*rest, (b"x-request-id", id.own.encode())]}, id


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request asked of the sampler.

    `max_tokens` is what the engine took: never more than the context had room for. `constrained`: the answer is held
    to a schema, a grammar or choices. `tools`: the request names tools. `others` is a digest of what else shapes an
    answer (top_p, penalties, stop and the like); "" where all of it is vLLM's default.
    """

    max_tokens: int
    temperature: float
    constrained: bool = False
    tools: bool = False
    others: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence as the engine made it. Times are seconds; None where the engine did not come that far.

    `queue` ended when the prompt's turn came; `first` is the wall-clock time of the first token; `gap` and `worst_gap`
    are the mean and the longest wait for a token after the first. `logprobs` are those of the tokens that were sampled,
    if they were asked for. `text` is what was said, if the engine made text of it. `cached` of the prompt's tokens came
    from the prefix cache. `engine_seconds` is its part of the time that the engine's steps took. `prefill` is the time
    from the prompt's turn in the engine to the first token. `drafts`: tokens computed ahead of their turn, and right.
    """

    prompt: Sequence[int]
    output: Sequence[int]
    finish_reason: str
    text: str = ""
    queue: float | None = None
    first: float | None = None
    gap: float | None = None
    worst_gap: float | None = None
    logprobs: Sequence[float] | None = None
    cached: int = 0
    engine_seconds: float = 0.0
    parameters: Parameters | None = None
    prefill: float | None = None
    drafts: tuple[int, int] = (0, 0)


def count_prompt_tokens(generations: Iterable[Generation]) -> int:
    """Of several sequences of one prompt it counts once; the prompts of a batch count each."""
    return sum({id(generation.prompt): len(generation.prompt) for generation in generations}.values())


def count_generated_tokens(generations: Iterable[Generation]) -> int:
    return sum(len(generation.output) for generation in generations)


def count_cached_tokens(generations: Iterable[Generation]) -> int:
    """Tokens of prompts that came from the prefix cache; of several sequences of one prompt, the first computes."""
    cached: dict[int, int] = {}
    for generation in generations:
        prompt = id(generation.prompt)
        cached[prompt] = min(generation.cached, cached.get(prompt, generation.cached))
    return sum(cached.values())


def sum_engine_seconds(generations: Iterable[Generation]) -> float:
    """Their part of the time that the engine's steps took."""
    return sum(generation.engine_seconds for generation in generations)


class Failure(StrEnum):
    """Why the server did not answer a request, or not to its end."""

    OVERLOADED = "overloaded"  # 429: it would have waited too long for a seat
    UNAVAILABLE = "unavailable"  # 503: the engine was not there, and the request never began
    QUEUE_DEADLINE = "queue_deadline"  # the client's deadline passed before the request began
    DEADLINE = "deadline"  # the client's deadline passed while it was answered, also in the middle of a stream
    ERROR = "error"  # any other 5xx, and an answer that broke off


class Generating(Protocol):
    """A sequence that the engine works on, or has."""

    def read(self) -> Generation: ...


class Routed(Protocol):
    """What the tap takes of a route."""

    @property
    def model(self) -> str: ...
    @property
    def adapter(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def asker(self) -> bytes | None: ...
    @property
    def dealt(self) -> bool: ...
    @property
    def draw(self) -> bytes | None: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def role(self) -> str: ...


@dataclass(slots=True)
class Watch:
    """What the backend is to leave of a request, and has left."""

    logprobs: bool = False
    # The server's own: no client waits for it.
    background: bool = False
    # The request names tools: their definitions are in the prompt, and an answer may be a call.
    tools: bool = False
    sequences: list[Generating] = field(default_factory=list)
    # What sends the tokens of its one sequence, if it is a plain stream.
    fast_stream: FastStream | None = None
    # Gets each prompt before anything is computed for it (None: one that is no tokens), and may refuse it by raising.
    gate: Callable[[Sequence[int] | None], None] | None = None

    def guard(self, gate: Callable[[Sequence[int] | None], None] | None) -> None:
        """Have each prompt pass `gate`."""
        self.gate = gate

    def read(self) -> tuple[Generation, ...]:
        """What the engine has made until now, whether or not anybody got it."""
        return tuple(sequence.read() for sequence in self.sequences)


# The request that the current task answers; a lease sets it. A ContextVar goes with it through vLLM's app into the
# engine.
watching: ContextVar[Watch | None] = ContextVar("watching", default=None)
# The adapter that it asks, as the engine knows it; set with it.
leased: ContextVar[str | None] = ContextVar("leased", default=None)


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """Who answers a request for `auto`, as its caller may name it, why, and by how much its prompt fits the best
    adapter better than the next one, in nats; None where there is no next one."""

    name: str
    reason: str
    margin: float | None = None

    @property
    def header(self) -> str:
        margin = "" if self.margin is None else f"; margin={self.margin:.2f}"
        return f"{self.name}; reason={self.reason}{margin}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went by. Times are seconds from its arrival; None where there was none.

    `adapter` and `version` are its labels (`other` where no model was found for it), `id` the adapter as the engine
    knows it ("" for the base), `asker` what stays the same from request to request of one user or conversation.
    `seat_wait` is how long it waited for a seat once it had been read, or until it gave up; `seated` when it had its
    seat and its adapter, and went to the engine. `failure` says why it was not answered, or not to the end.
    """

    adapter: str
    version: str
    status: int
    first: float | None
    total: float
    id: str = ""
    request_id: str = ""
    tenant: str = ""
    asker: bytes | None = None
    began: float = 0.0
    generations: tuple[Generation, ...] = ()
    # A canary or the live version took it because it is one: the request named neither by number.
    dealt: bool = False
    # Of the trace that the request belongs to, if it is known.
    trace_id: str = ""
    # The request's body, if it is short, its bytes, and whether the context has no room for the request's prompt.
    question: Mapping[str, Any] | None = None
    question_bytes: int = 0
    over_context: bool = False
    seated: float | None = None
    # What names the random draw that chose its version; requests with the same one share their luck.
    draw: bytes | None = None
    seat_wait: float | None = None
    failure: Failure | None = None
    # None while nothing is traced.
    trace: RequestTrace | None = None
    # What the client calls the request (`RequestId`), and the id of the API key that it came with.
    client_id: str = ""
    key: str = ""
    # What `auto` chose, if that was asked.
    auto: AutoChoice | None = None

    @property
    def routed(self) -> bool:
        """Its prompt was chosen by what its adapter is asked."""
        return self.auto is not None

    @property
    def echoed_id(self) -> str:
        """What the answer's x-request-id said."""
        return self.client_id or self.request_id

    @property
    def prompt_tokens(self) -> int:
        return count_prompt_tokens(self.generations)

    @property
    def generated_tokens(self) -> int:
        return count_generated_tokens(self.generations)

    @property
    def cached_tokens(self) -> int:
        return count_cached_tokens(self.generations)

    @property
    def engine_seconds(self) -> float:
        return sum_engine_seconds(self.generations)

    @property
    def nbytes(self) -> int:
        """About how much memory it holds: 8 bytes a token and log-probability, the text, and the request's body."""
        held = sum(
            8 * (len(made.prompt) + len(made.output) + len(made.logprobs or ())) + len(made.text)
            for made in self.generations
        )
        return held + len(self.asker or b"") + len(self.draw or b"") + self.question_bytes

    @property
    def finish_reason(self) -> str:
        """How the last sequence ended; "" when there was none."""
        return self.generations[-1].finish_reason if self.generations else ""

    @property
    def queue(self) -> float | None:
        queued = (generation.queue for generation in self.generations)
        return min((seconds for seconds in queued if seconds is not None), default=None)

    @property
    def prefill(self) -> tuple[float, int] | None:
        """Seconds to the first token without any queue and without loading an adapter, and the tokens computed for it.

        As the engine timed it; from the seat on, if it did not.
        """
        timed = [made for made in self.generations if made.prefill is not None]
        if timed:
            made = min(timed, key=lambda made: made.prefill or 0.0)
            return made.prefill or 0.0, len(made.prompt) - made.cached
        if self.first is None or self.seated is None:
            return None
        return self.first - self.seated, self.prompt_tokens

    @property
    def counted_as(self) -> bytes | None:
        """Of requests with the same one, only the first counts in a comparison of versions; None counts each."""
        return self.asker if self.draw is None else self.draw

    @property
    def gap(self) -> float | None:
        """The mean wait between two tokens, over all of the request's sequences."""
        waited = [(made.gap, len(made.output) - 1) for made in self.generations if made.gap is not None]
        count = sum(tokens for _, tokens in waited)
        return sum(gap * tokens for gap, tokens in waited) / count if count else None

    @property
    def worst_gap(self) -> float | None:
        gaps = (generation.worst_gap for generation in self.generations)
        return max((seconds for seconds in gaps if seconds is not None), default=None)


class Tap:
    """Stands in a response's way: `send` passes everything on as it came, with the request's id and who answers."""

    __slots__ = (
        "_crashed",
        "_error",
        "_first",
        "_left_out",
        "_load_seconds",
        "_queued",
        "_seated",
        "_send",
        "_started",
        "adapter",
        "asker",
        "auto",
        "began",
        "dealt",
        "draw",
        "ended",
        "events",
        "id",
        "key",
        "over_context",
        "question",
        "question_bytes",
        "registry_age",
        "request_id",
        "status",
        "tenant",
        "trace",
        "trace_id",
        "version",
        "watch",
    )

    def __init__(
        self,
        send: Send,
        request_id: RequestId = RequestId(""),
        trace_id: str = "",
        trace: RequestTrace | None = None,
        background: bool = False,
    ) -> None:
        self._send = send
        self._started = time.perf_counter()
        self._first: float | None = None
        self._queued: float | None = None
        self._seated: float | None = None
        self._load_seconds, self._crashed = 0.0, False
        self._error: type[LoradockError] | None = None
        self.began = time.time()
        self.request_id = request_id
        self.trace_id, self.trace = trace_id, trace
        self.adapter = "other"
        self.version = ""
        self.id = ""
        self.tenant = self.key = ""
        self.asker: bytes | None = None
        self.dealt = False
        self.draw: bytes | None = None
        self.status = LEFT
        self.auto: AutoChoice | None = None
        self.watch = Watch(background=background)
        # The answer is a stream of server-sent events.
        self.events = False
        # The client has been sent all of it.
        self.ended = False
        # Another server answered, and counts it.
        self._left_out = False
        self.question: Mapping[str, Any] | None = None
        self.question_bytes = 0
        self.over_context = False
        # Seconds since the registry was read last, where it cannot be.
        self.registry_age: float | None = None

    @property
    def begun(self) -> bool:
        """The client has been sent a status."""
        return self.status != LEFT

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            auto = self.auto.header if self.auto else ""
            message = labelled(message, self.request_id.echo, self._version_tag(), self.trace, auto, self.registry_age)
            self.events = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
        elif self._first is None:
            self._first = time.perf_counter()
            self.over_context = self.status == 400 and bool(_OVER_CONTEXT.search(message.get("body", b"")))
        await self._send(message)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    def _version_tag(self) -> str:
        """Which version gives the answer, as its caller may name it; a mixture, as the engine knows it."""
        if self.version == MIXED:
            return short_name(self.id, self.tenant)
        return version_tag(self.adapter, self.version, self.tenant) if self.id else ""

    def registry_was_read(self, age: float | None) -> None:
        """Say how many seconds ago the registry was read, if it cannot be read now."""
        self.registry_age = age

    def asked(self, question: Mapping[str, Any], nbytes: int) -> None:
        """Say what the request's body holds, and how long it is; a long one, as with pictures, is not kept."""
        if nbytes <= QUESTION_BYTES:
            self.question, self.question_bytes = question, nbytes
        self.watch.tools = bool(question.get("tools"))
        if self.trace:
            self.trace.asked(question.get("model"), question.get("stream"))

    def chose(self, choice: AutoChoice | None) -> None:
        """Say what `auto` chose, if that was asked."""
        self.auto = choice

    def queued(self, tenant: str, key: str = "") -> None:
        """The request has been read, and waits for its turn."""
        self.tenant = tenant
        self.key = key
        self._queued = time.perf_counter()

    def addressed(self, adapter: str, version: str) -> None:
        """Say who is to answer, also if it never gets that far."""
        self.adapter, self.version = adapter, version

    def routed(self, route: Routed, tenant: str, logprobs: bool = False) -> None:
        """Say who answers, and whom, and whether log-probabilities are to be kept; from now on it has its seat, and the
        adapter is loaded."""
        self.watch.logprobs = logprobs
        self._seated, self._load_seconds = time.perf_counter(), route.load_seconds
        self.adapter, self.version = route.adapter, route.version
        self.id = "" if route.version == "base" else route.model
        self.tenant = tenant
        self.asker = route.asker
        self.dealt = route.dealt
        self.draw = route.draw
        if self.trace:
            self.trace.role, self.trace.load_seconds = route.role, route.load_seconds

    def streams(self, fast_stream: FastStream | None) -> None:
        """Say what sends the tokens, if it is a plain stream."""
        self.watch.fast_stream = fast_stream

    def failed(self, error: LoradockError) -> None:
        """Say why there is no answer, or no more of it."""
        # Not the error: by its frames it would hold this, and with it the body, until garbage is collected.
        self._error = type(error)

    def crashed(self) -> None:
        """A defect ended it: whoever stands outside answers with a 500, if nothing has been sent."""
        self._crashed = True
        self.status = self.status if self.begun else 500

    def leave_out(self) -> None:
        """It is no exchange of this server's: another one answered, and counts it."""
        self._left_out = True

    def offer(self, take: Callable[[Exchange], None]) -> None:
        """Hand what was seen to `take`."""
        if self._left_out:
            return
        try:
            take(self._exchange())
        except Exception:  # whatever is wrong with the watchers, the answer is the client's
            log.exception("a request was not counted")

    def _exchange(self) -> Exchange:
        total = time.perf_counter() - self._started
        generations = self.watch.read()
        token = min((made.first for made in generations if made.first is not None), default=None)
        if token is not None:
            first: float | None = min(max(token - self.began, 0.0), total)
        else:
            first = None if self._first is None else self._first - self._started
        if self.trace and self._queued is not None:
            self.trace.queued = self._queued - self._started
        return Exchange(
            self.adapter,
            self.version,
            self.status,
            first,
            total,
            self.id,
            self.request_id.own,
            self.tenant,
            self.asker,
            self.began,
            generations,
            self.dealt,
            self.trace_id,
            self.question,
            self.question_bytes,
            self.over_context,
            None if self._seated is None else self._seated - self._started,
            self.draw,
            seat_wait=self._seat_wait(total),
            failure=self._failure(generations),
            trace=self.trace,
            client_id=self.request_id.client,
            key=self.key,
            auto=self.auto,
        )

    def _seat_wait(self, total: float) -> float | None:
        """None for what did not wait for a seat: it was refused at once, or nobody knew the model."""
        if self._queued is None or not self.version:
            return None
        if self._seated is not None:
            return max(0.0, self._seated - self._queued - self._load_seconds)
        gave_up = self._error is None or issubclass(self._error, ClientLeft | DeadlineExceeded)
        return self._started + total - self._queued if gave_up else None

    def _failure(self, generations: Sequence[Generation]) -> Failure | None:
        error = self._error or LoradockError
        if issubclass(error, Overloaded):
            return Failure.OVERLOADED
        if issubclass(error, DeadlineExceeded):
            return Failure.QUEUE_DEADLINE if self._seated is None else Failure.DEADLINE
        if issubclass(error, EngineUnavailable):
            return Failure.UNAVAILABLE if self._seated is None else Failure.ERROR
        if self._crashed or self.status >= 500 or any(made.finish_reason == "error" for made in generations):
            return Failure.ERROR
        return None
