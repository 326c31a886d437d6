"""A shadow answers the requests of the live version too, unseen by clients, for comparison only.

It begins when the client's answer has ended, with a lease of its own and behind every client in the engine's queue.
Few run at a time: requests that come while all are busy are dropped and counted. Its errors reach no client.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from starlette.types import Message

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.asgi.exchange import Exchange, Tap, Watch
from serve.asgi.internal_client import RecordedAnswer, post
from serve.asgi.trace_context import RequestTrace
from serve.engine.background import background_lease
from serve.engine.engine import Lease
from serve.engine.fleet import Fleet
from serve.engine.payer import Cause, Payer
from serve.errors import LoradockError
from serve.rollout.canary.shadow_agreement import ShadowAgreement

log = logging.getLogger(__name__)

# Whose answers can be compared.
PATHS = re.compile(r"/v1/(chat/completions|completions|responses|messages)")
MAX_ANSWER = 1 << 20
SECONDS = 300.0

# The grades of a client's answer and a shadow's, if somebody judges them.
Grade: TypeAlias = Callable[[Adapter, Mapping[str, Any], tuple[str, str]], Awaitable[tuple[float, float] | None]]


ROLE = "shadow"


class Tracer(Protocol):
    """Who makes spans of answers."""

    def again(self, trace: RequestTrace | None, role: str) -> RequestTrace | None: ...
    def take(self, exchange: Exchange) -> None: ...


@dataclass(frozen=True, slots=True)
class ShadowExchange:
    """One request, as the engine got it, and two answers.

    `live` is as the client got it (a stream's events, if it asked for a stream). `name` holds the adapter's tenant; who
    asked may be of another, if the adapter is shared.
    """

    name: str
    live_version: int
    candidate_version: int
    path: str
    request: Mapping[str, Any]
    live: bytes
    candidate: bytes
    status: int
    seconds: float


class Shadows:
    """At most `limit` answers at a time. `count(name, version, result)` counts; `on_shadow` gets the pairs.

    `agreement` compares the two answers, in a thread; `grade` has a sample of them judged. `tracer` makes a trace of
    its own of each answer, linked to the client's.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        count: Callable[[str, str, str], None],
        on_shadow: Callable[[ShadowExchange], None] | None = None,
        *,
        limit: int = 2,
        agreement: ShadowAgreement | None = None,
        grade: Grade | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._fleet = fleet
        self._store = store
        self._count = count
        self._on_shadow = on_shadow
        self._limit = limit
        self._agreement = agreement
        self._grade = grade
        self._running: set[asyncio.Task[None]] = set()

    def offer(
        self,
        candidate: Adapter,
        live: int,
        path: str,
        fields: Mapping[str, Any],
        answer: RecordedAnswer,
        sequences: int = 1,
        watch: Watch | None = None,
        trace: RequestTrace | None = None,
    ) -> None:
        """Have `candidate` answer too, if the real answer is whole and there is room; never waits, never raises.

        `watch` has what the engine generated for the client, whose trace is `trace`.
        """
        if answer.status != 200 or answer.body is None or not PATHS.fullmatch(path) or fields.get("background"):
            return
        if len(self._running) >= self._limit:
            self._count(candidate.name, f"v{candidate.version}", "dropped")
            return
        seen = self._seen(candidate, trace)
        task = asyncio.create_task(self._run(candidate, live, path, fields, answer.body, sequences, watch, seen))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Break off what runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(
        self,
        candidate: Adapter,
        live: int,
        path: str,
        fields: Mapping[str, Any],
        answer: bytes,
        sequences: int,
        watch: Watch | None,
        seen: Tap,
    ) -> None:
        result, own = "failed", seen.watch
        try:
            began = time.perf_counter()
            async with asyncio.timeout(SECONDS):
                unseen = await self._answer(candidate, path, fields, sequences, seen)
            seen.status = unseen.status
            if self._tracer:
                seen.offer(self._tracer.take)
            seconds = time.perf_counter() - began
            result = "answered" if unseen.status == 200 else "failed"
            if unseen.status == 200 and watch:
                await self._compare(candidate, live, fields, watch, own)
            if self._on_shadow:
                self._on_shadow(
                    ShadowExchange(
                        candidate.name,
                        live,
                        candidate.version,
                        path,
                        fields,
                        answer,
                        unseen.body or b"",
                        unseen.status,
                        seconds,
                    )
                )
        except (LoradockError, TimeoutError) as error:
            log.warning("the shadow %s did not answer: %s", candidate.tag, error or "it took too long")
        except Exception:  # nobody waits for this task: the hook's and the engine's errors end here
            log.exception("the shadow %s failed", candidate.tag)
        finally:
            self._count(candidate.name, f"v{candidate.version}", result)

    def _seen(self, candidate: Adapter, trace: RequestTrace | None) -> Tap:
        """What keeps the times of a shadow's answer, and what the engine makes of it."""
        repeated = self._tracer.again(trace, ROLE) if self._tracer else None
        seen = Tap(_to_nobody, trace=repeated, background=True)
        seen.queued(candidate.tenant)
        seen.addressed(candidate.name, f"v{candidate.version}")
        return seen

    async def _compare(
        self, candidate: Adapter, live: int, fields: Mapping[str, Any], watch: Watch, own: Watch
    ) -> None:
        if self._agreement is None or not watch.sequences or not own.sequences:
            return
        ours, theirs = watch.sequences[0].read(), own.sequences[0].read()
        grades, versions = None, (live, candidate.version)
        try:
            if self._grade:
                grades = await self._grade(candidate, fields, (ours.text, theirs.text))
        except LoradockError as error:
            log.warning("the answers of %s were not judged: %s", candidate.tag, error)
        await asyncio.to_thread(self._agreement.compare, candidate.name, versions, fields, ours, theirs, grades)

    async def _answer(
        self, candidate: Adapter, path: str, fields: Mapping[str, Any], sequences: int, seen: Tap
    ) -> RecordedAnswer:
        base = self._fleet.of(candidate.name)
        payer = Payer(candidate.tenant, Cause.SHADOW, None)  # whoever put it there
        async with background_lease(base, self._store, candidate, payer, sequences=sequences) as lease:
            answerer = _Answerer(lease.model, candidate.name, f"v{candidate.version}", lease.load_seconds)
            seen.routed(answerer, candidate.tenant)
            return await post(lease, path, _unseen(fields, lease, path), limit=MAX_ANSWER, watch=seen.watch)


@dataclass(frozen=True, slots=True)
class _Answerer:
    """A shadow, as a tap takes whoever answers."""

    model: str
    adapter: str
    version: str
    load_seconds: float
    role: str = ROLE
    asker: bytes | None = None
    draw: bytes | None = None
    dealt: bool = False


async def _to_nobody(message: Message) -> None:
    """No client gets a shadow's answer."""


def _unseen(fields: Mapping[str, Any], lease: Lease, path: str) -> dict[str, Any]:
    """The same request for the candidate: not streamed, not stored, behind every client."""
    asked = {key: value for key, value in fields.items() if key not in ("stream", "stream_options", "request_id")}
    asked |= {"model": lease.model, "stream": False}
    if path != "/v1/messages" and lease.priority is not None:
        asked["priority"] = lease.priority
    if path == "/v1/responses":
        asked["store"] = False
    return asked
