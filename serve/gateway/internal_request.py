"""A request that the server makes in a caller's name: with the caller's rights, limits and usage, and without a socket.

Batches ask their lines so, behind every client; moderations ask their guard model so. Latency metrics, drift and
canaries do not see it: no client waits for this very answer, or waits for more than it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from serve.asgi.exchange import Exchange, Watch
from serve.asgi.internal_client import RecordedAnswer, post
from serve.auth.auth import Caller
from serve.auth.rate_limits import Meters
from serve.engine.engine import LOW_PRIORITY
from serve.errors import EngineUnavailable
from serve.gateway.fan_out import FanOut, RequestBounds
from serve.gateway.metering import metered
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
    """`take` gets an Exchange of each request that has ended, however it did."""

    def __init__(self, router: Router, meters: Meters, take: Callable[[Exchange], None], bounds: RequestBounds) -> None:
        self._router, self._meters, self._take, self._bounds = router, meters, take, bounds

    async def ask(
        self, caller: Caller, path: str, request: InferenceRequest, *, limit: int, priority: int = 0
    ) -> InternalAnswer:
        """The answer, be it an error's; a body above `limit` bytes is None. LoradockErrors for what came to none.

        RateLimited, Overloaded and EngineUnavailable say when to come again; BrokeOff is of an engine that died.
        """
        fan_out = FanOut.of(path, request.fields, len(request.body))
        fan_out.check(self._bounds.of(caller.limits))
        watch = Watch(background=priority >= LOW_PRIORITY, tools=bool(request.fields.get("tools")))
        recorded, labels = RecordedAnswer(limit), ("other", "")
        fields = {**request.fields, "priority": priority}
        began, started = time.time(), time.perf_counter()
        try:
            with metered(self._meters.of(caller.key, caller.limits), watch):
                async with self._router.lease(request.model, caller, fields, fan_out.seats) as route:
                    labels = (route.adapter, route.version)
                    sent = request.rewritten(path, route, caller.tenant)
                    try:
                        recorded = await post(route.engine, path, sent, limit=limit, watch=watch)
                    except EngineUnavailable as gone:
                        raise BrokeOff(gone.message, retry_after=gone.retry_after) from gone
        finally:
            exchange = Exchange(
                *labels,
                recorded.status,
                None,
                time.perf_counter() - started,
                request_id=uuid.uuid4().hex,
                tenant=caller.tenant,
                began=began,
                generations=tuple(sequence.read() for sequence in watch.sequences),
            )
            self._take(exchange)
        return InternalAnswer(recorded, exchange)
