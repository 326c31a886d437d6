"""What becomes of a rating: it is joined to its answer, counted, and told to whoever decides by it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from serve.api.captures import Captures
from serve.asgi.exchange_worker import ExchangeWorker
from serve.dataset.feedback import GOOD, Feedback
from serve.errors import NotFound
from serve.fleet.server_messages import Claim, Content
from serve.loop.loops import Loops
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.policy import Policies
from serve.telemetry.metrics import Metrics
from serve.telemetry.tracing.tracing import Tracing

# The kind of the messages that ask it of another server.
RATE = "rate"


class RatedAnswers:
    """Of the answers that this server gave."""

    def __init__(
        self,
        feedback: Feedback,
        captures: Captures,
        policies: Policies,
        loops: Loops,
        metrics: Metrics,
        tracing: Tracing | None,
        exchange_worker: ExchangeWorker,
        canary_monitor: CanaryMonitor,
    ) -> None:
        self._feedback = feedback
        self._captures = captures
        self._policies = policies
        self._loops = loops
        self._metrics = metrics
        self._tracing = tracing
        self._exchange_worker = exchange_worker
        self._canary_monitor = canary_monitor

    async def rate(
        self, tenant: str, key: str, request_id: str, rating: float | None, answer: str | None
    ) -> dict[str, Any]:
        """Take a rating of this tenant's, which came with the API key of this id; NotFound, BadRequest."""
        try:
            answered, score = self._feedback.join(tenant, key, request_id, rating, answer)
        except NotFound:
            # Captured requests are kept for longer than those that a rating is counted for. One that was rated already
            # may not be written down yet.
            said = (tenant, key, request_id, rating, answer)
            is_rated = self._feedback.find(tenant, key, request_id) is not None
            if is_rated or not await asyncio.to_thread(self._captures.conversations.rate, *said):
                raise
            return {"object": "feedback", "request_id": request_id, "rating": rating}
        try:
            await self._captures.rated(answered, tenant, rating, answer)
        except BaseException:
            answered.withdraw()  # nothing was counted: it can be said again
            raise
        label = "good" if score >= GOOD else "bad"
        self._metrics.rated(answered.adapter, answered.version, label)
        has_say = self._policies[answered.adapter].verdicts.has(answered.adapter, tenant)
        if has_say:
            self._loops.ratings.take(answered.adapter, answered.version, score, key)
        if self._tracing:
            self._tracing.rated(answered.adapter, answered.version, score, label, answered.trace)
        if answered.dealt and has_say:
            rated = answered.adapter, answered.version, score, answered.asker, key
            self._exchange_worker.submit(partial(self._canary_monitor.rate, *rated))
        return {"object": "feedback", "request_id": request_id, "rating": score}

    async def rate_for_another(self, content: Content, claim: Claim) -> Content | None:
        """Take a rating that another server was sent, whose client's key it has looked at."""
        request = content["tenant"], content["key"], content["request_id"]
        answered = self._feedback.find(*request)
        if answered is not None and (answered.rating is not None or not await claim()):
            return None
        try:
            return await self.rate(*request, content["rating"], content["answer"])
        except NotFound:
            return None
