"""A fake engine whose every number is known: what a request's `known` field asks for is what it does and counts."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve.asgi.exchange import Generation, watching
from tests.support.backend import FakeBackend, FakeSequence

PROMPT_TOKENS = 6
# What an answer takes in the engine, if nothing else is asked for.
ANSWER_SECONDS = 0.02
QUEUE, GAP, WORST_GAP = 0.01, 0.02, 0.03
# Of the engine's own time, for each answer.
ENGINE_SECONDS = 0.004
MEMORY = 7 << 20
KV_CACHE, WAITING_INSIDE, PREEMPTIONS, HITS, QUERIES = 0.25, 3, 2, 30, 120
VOCABULARY = 32


class KnownBackend(FakeBackend):
    """`known` of a request: `tokens` and `finish` of its answer, `status`, and the `seconds` that it takes.

    While `standstill` is set no answer ends.
    """

    max_resident = 8
    slots = 4
    seats = 4

    def __init__(self, model: str | None = None, seats: int = 4) -> None:
        super().__init__(model)
        self.seats = seats
        self.memory, self.waiting = MEMORY, WAITING_INSIDE
        self.standstill = threading.Event()
        # Of vLLM's own series, over all engines that came after one another.
        self.counts: Counter[str] = Counter()
        self._random = random.Random(0)

    def another(self, model: str | None = None) -> KnownBackend:
        heir = KnownBackend(model or self.model, self.seats)
        heir.name, heir.standstill, heir.counts = self.name, self.standstill, self.counts
        self.heirs.append(heir)
        return heir

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).json()
        known: dict[str, Any] = body.get("known", {})
        status = known.get("status", 200)
        if status == 200:
            self._generate(known)
        self.running += 1
        try:
            await asyncio.sleep(known.get("seconds", ANSWER_SECONDS))
            while self.standstill.is_set():
                await asyncio.sleep(0.01)
        finally:
            self.running -= 1
        error = {"message": "as it was asked to", "type": "internal_error", "param": None, "code": status}
        answer = {"model": body.get("model")} if status == 200 else {"error": error}
        await JSONResponse(answer, status_code=status)(scope, receive, send)

    def _generate(self, known: dict[str, Any]) -> None:
        prompt = [self._random.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]
        output = [self._random.randrange(VOCABULARY) for _ in range(known.get("tokens", 5))]
        finish = known.get("finish", "stop")
        made = Generation(
            prompt, output, finish, queue=QUEUE, gap=GAP, worst_gap=WORST_GAP, engine_seconds=ENGINE_SECONDS
        )
        if watch := watching.get():
            watch.sequences.append(FakeSequence(made))
        self.counts.update(prompt=len(prompt), generated=len(output), steps=1)

    def busy_seconds(self) -> dict[str, float]:
        return {"clients": ENGINE_SECONDS * self.counts["steps"], "background": 0.0}

    def _metrics(self) -> list[Metric]:
        """vLLM's own series that the dashboards show."""
        labels = {"model_name": self.name, "engine": "0"}
        counts = self.counts
        gauges = {
            "kv_cache_usage_perc": KV_CACHE,
            "num_requests_running": self.running,
            "num_requests_waiting": WAITING_INSIDE,
        }
        counters = {
            "prompt_tokens": counts["prompt"],
            "generation_tokens": counts["generated"],
            "num_preemptions": PREEMPTIONS * (counts["steps"] > 0),
            "prefix_cache_hits": HITS * (counts["steps"] > 0),
            "prefix_cache_queries": QUERIES * (counts["steps"] > 0),
        }
        families: list[Metric] = []
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", "As vLLM has it.", labels=tuple(labels))
            gauge.add_metric(tuple(labels.values()), value)
            families.append(gauge)
        for name, value in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", "As vLLM has it.", labels=tuple(labels))
            counter.add_metric(tuple(labels.values()), value)
            families.append(counter)
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "As vLLM has it.", labels=tuple(labels))
        total = counts["prompt"] + counts["generated"]
        steps.add_metric(tuple(labels.values()), [("+Inf", counts["steps"])], total)
        return [*families, steps]
