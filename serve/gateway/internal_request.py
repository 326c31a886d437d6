"""A request that the server makes in a caller's name: with the caller's rights and limits, and without a socket.

Batches ask their lines so, behind every client; moderations ask their guard model so. Latency metrics, drift and
canaries do not see it: no client waits for this very answer, or waits for more than it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from serve.adapters.added_tokens import control_tokens
from serve.asgi.exchange import Exchange, Watch
from serve.asgi.internal_client import RecordedAnswer, post
from serve.auth.auth import Caller
from serve.auth.rate_limits import Meters
from serve.engine.engine import LOW_PRIORITY
from serve.engine.payer import Cause, Payer
from serve.errors import EngineUnavailable
from serve.gateway.fan_out import FanOut, RequestBounds
from serve.gateway.reading import Reading
from serve.gateway.request import InferenceRequest
from serve.gateway.router import Router


class BrokeOff(EngineUnavailable):
    """The engine ended in the middle of this answer."""


@dataclass(frozen=True, slots=True)
class InternalAnswer:
    """An answer as it would have gone over HTTP, and what the engine did for it."""

    recorded: RecordedAnswer
    exchange: Exchange


class InternalRequests:
    def __init__(self, router: Router, meters: Meters, bounds: RequestBounds) -> None:
        self._router = router
        self._meters = meters
        self._bounds = bounds

    def reading(self, caller: Caller, path: str, request: InferenceRequest) -> Reading:
        """What an engine would read of it."""
        base = self._router.base_of(request.model, caller)
        return Reading(base, path, request.unanswered(path, base.name, caller.tenant))

    def special_tokens(self, caller: Caller, model: str | None) -> frozenset[str]:
        """Those of what a name means to a caller; NotFound."""
        return control_tokens(self._router.base_of(model, caller).backend.tokens, self._router.answerer(model, caller))

    def labels(self, caller: Caller, model: str | None) -> tuple[str, ...]:
        """Of the classification head behind what a name means to a caller, in order; NotFound."""
        adapter = self._router.answerer(model, caller)
        return tuple(adapter.checks.get("labels", ())) if adapter else ()

    def payer(self, caller: Caller, cause: Cause) -> Payer:
        """Whoever asks, with their key's meter."""
        return Payer.of(caller, cause, self._meters)

    async def ask(
        self,
        caller: Caller,
        path: str,
        request: InferenceRequest,
        *,
        payer: Payer,
        limit: int,
        priority: int = 0,
        gate: Callable[[Sequence[int] | None], None] | None = None,
    ) -> InternalAnswer:
        """The answer, be it an error's; a body above `limit` bytes is None. LoradockErrors for what came to none.

        It counts as a request of the caller's key; its tokens are charged to `payer`, and `gate` may refuse prompts.
        RateLimited, Overloaded and EngineUnavailable say when to come again; BrokeOff is of an engine that died.
        """
        fan_out = FanOut.of(path, request.fields, len(request.body))
        fan_out.check(self._bounds.of(caller.limits))
        watch = Watch(background=priority >= LOW_PRIORITY, tools=bool(request.fields.get("tools")), gate=gate)
        fields = {**request.fields, "priority": priority}
        began, started = time.time(), time.perf_counter()
        meter = self._meters.of(caller.key, caller.limits)
        with meter.request() if meter else nullcontext():
            async with self._router.lease(request.model, caller, payer, fields, fan_out.seats) as route:
                sent = request.rewritten(path, route, caller.tenant)
                try:
                    recorded = await post(route.lease, path, sent, limit=limit, watch=watch)
                except EngineUnavailable as gone:
                    raise BrokeOff(gone.message, retry_after=gone.retry_after) from gone
        exchange = Exchange(
            route.adapter,
            route.version,
            recorded.status,
            None,
            time.perf_counter() - started,
            request_id=uuid.uuid4().hex,
            tenant=caller.tenant,
            began=began,
            generations=watch.read(),
        )
        return InternalAnswer(recorded, exchange)
