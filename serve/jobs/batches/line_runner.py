"""One line of a batch is answered as a request of the key that made the batch, behind every client.

The key's rights, limits and tenant are those of this moment, and so is what a model's name means: a key that was
revoked, or an adapter that is gone, makes an error of the line. The tokens are on the key and in the tenant's usage;
latency metrics and drift do not see them, because a line waits for as long as clients keep the engine.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from serve.asgi.internal_client import RecordedAnswer
from serve.auth.auth import Auth, Caller, Scope, allowed
from serve.engine.background import is_idle
from serve.engine.engine import LOW_PRIORITY
from serve.engine.payer import Cause
from serve.engine.supervisor import Supervisor
from serve.errors import BadRequest, LoradockError, Unauthorized
from serve.gateway.auto import Auto
from serve.gateway.guard import Guards
from serve.gateway.internal_request import InternalAnswer, InternalRequests
from serve.gateway.request import InferenceRequest
from serve.gateway.router import Router
from serve.jobs.batches.objects import Usage
from serve.rollout.registry_sync import RegistrySync

# A longer answer is an error of its line: it is in memory as a whole.
MAX_ANSWER = 8 << 20
# While clients are answered a line waits, but no longer than this; then one line at a time goes behind them.
GAP_SECONDS, LOOK_SECONDS = 5.0, 0.05


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """An answer as it would have come over HTTP. `body` is JSON in one line."""

    status: int
    body: bytes
    request_id: str
    usage: Usage = Usage()

    @classmethod
    def of(cls, error: LoradockError) -> LineAnswer:
        return cls(error.status, msgspec.json.encode(error.body()), uuid.uuid4().hex)


class Stopped(Exception):
    """The batch asks no more lines."""


class Gaps:
    """Lets lines to an engine: `concurrency` at a time while no client is answered, beside clients one now and then."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._running: Counter[str] = Counter()
        # Whoever came first looks for a gap; the others wait for it.
        self._doors: WeakKeyDictionary[Supervisor, asyncio.Lock] = WeakKeyDictionary()

    @asynccontextmanager
    async def turn(self, base: Supervisor, stopped: Callable[[], bool]) -> AsyncIterator[None]:
        """One line's, until the block ends; Stopped instead, once it is."""
        clock = asyncio.get_running_loop().time
        async with self._doors.setdefault(base, asyncio.Lock()):
            came = clock()
            while not self._has_gap(base, clock() - came):
                if stopped():
                    raise Stopped
                await asyncio.sleep(LOOK_SECONDS)
            self._running[base.name] += 1
        try:
            yield
        finally:
            self._running[base.name] -= 1

    def _has_gap(self, base: Supervisor, waited: float) -> bool:
        if is_idle(base):
            return self._running[base.name] < self._concurrency
        return self._running[base.name] < 1 and waited >= GAP_SECONDS


class LineRunner:
    """With a `follower` of a shared registry, a line sees every change that other servers made before it."""

    def __init__(
        self,
        auth: Auth,
        router: Router,
        requests: InternalRequests,
        guards: Guards | None,
        follower: RegistrySync | None,
        auto: Auto,
        *,
        concurrency: int,
    ) -> None:
        self._auth = auth
        self._auto = auto
        self._router = router
        self._requests = requests
        self._guards = guards
        self._follower = follower
        self._gaps = Gaps(concurrency)

    async def ask(
        self, key: str, tenant: str, path: str, body: bytes, stopped: Callable[[], bool] = lambda: False
    ) -> LineAnswer:
        """The answer, be it an error's. Raises as `InternalRequests.ask`, and Stopped if it was not begun."""
        if self._follower:
            await self._follower.fresh()
            self._follower.check_age()
        request = InferenceRequest(body)
        _check_whole(request)
        try:
            self._auto.settle(request, path, self._caller(key, tenant))
            base = self._router.base_of(request.model, self._caller(key, tenant))
            async with self._gaps.turn(base, stopped):
                caller = self._caller(key, tenant)  # it waited: the key may be revoked by now
                answer = await self._guarded(caller, path, request)
        except LoradockError as error:
            if self._follower and (doubted := self._follower.doubted(error)) is not error:
                raise doubted from error
            raise
        exchange = answer.exchange
        usage = Usage(exchange.prompt_tokens, exchange.cached_tokens, exchange.generated_tokens)
        return LineAnswer(answer.recorded.status, _body(answer.recorded), exchange.request_id, usage)

    async def _guarded(self, caller: Caller, path: str, request: InferenceRequest) -> InternalAnswer:
        """The answer, past the guards of the model; BadRequest, if they refuse it or its request."""
        payer, guards = self._requests.payer(caller, Cause.BATCH), self._guards
        more: dict[str, Any] = {"payer": payer, "limit": MAX_ANSWER, "priority": LOW_PRIORITY}
        name = guards.watched(self._router.names_of(request.model, caller)) if guards else None
        if guards is None or name is None:
            return await self._requests.ask(caller, path, request, **more)
        reading = self._requests.reading(caller, path, request)
        await guards.check_prompt(name, payer, reading, priority=LOW_PRIORITY)
        answer = await self._requests.ask(caller, path, request, gate=guards.gate(name, reading), **more)
        if answer.recorded.status == 200:
            said = reading.said(answer.exchange.generations)
            await guards.check_answer(name, payer, said, priority=LOW_PRIORITY)
        return answer

    def _caller(self, key: str, tenant: str) -> Caller:
        caller = allowed(self._auth.holder(key), Scope.INFERENCE)
        if caller.tenant != tenant:
            raise Unauthorized("the API key that asked for this is another tenant's by now", code="invalid_api_key")
        return caller


def _check_whole(request: InferenceRequest) -> None:
    for field in ("stream", "background"):
        if request.fields.get(field):
            raise BadRequest(f"a batch has whole answers: leave `{field}` out", param=field)


def _body(answer: RecordedAnswer) -> bytes:
    """The answer's JSON in one line; an error that is no JSON as a text."""
    if answer.body is None:
        raise BadRequest(f"the answer has more than {MAX_ANSWER} bytes, the most that a batch keeps: ask for less")
    if answer.status == 200 and b"\n" not in answer.body:
        return answer.body
    try:
        return msgspec.json.encode(msgspec.json.decode(answer.body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.encode(answer.body.decode("utf-8", "replace"))
