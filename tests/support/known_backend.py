"""A fake engine whose every number is known: what a request's `known` field asks for is what it does and counts."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString
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
# Of each request in vLLM's own histograms, and their bounds.
PREFILL, DECODE = 0.02, 0.3
PHASE_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0)
LENGTHS = (2, 5, 10, 20)
# What NVIDIA's exporter says of the one GPU.
GPU = {"GPU_UTIL": 62.0, "FB_USED": 30_000.0, "FB_FREE": 10_000.0, "POWER_USAGE": 310.0, "GPU_TEMP": 71.0}
# What an answer says, and what one that is asked for a grade says.
TEXT, GRADE = "Paris", 0.5
# What a guard says of a text that holds the first.
VERDICTS = {"something forbidden": "violence", "something obscure": "perhaps"}


class KnownBackend(FakeBackend):
    """`known` of a request: `tokens` and `finish` of its answer, `status`, and the `seconds` that it takes.

    While `standstill` is set no answer ends.
    """

    max_resident = 12
    slots = 4
    seats = 4

    def __init__(self, model: str | None = None, seats: int = 4) -> None:
        super().__init__(model)
        self.seats = seats
        self.memory, self.waiting = MEMORY, WAITING_INSIDE
        self.standstill = threading.Event()
        # Of vLLM's own series, over all engines that came after one another.
        self.counts: Counter[str] = Counter()
        # Answers by their tokens.
        self.answers: Counter[int] = Counter()
        self._random = random.Random(0)

    def another(self, model: str | None = None) -> KnownBackend:
        heir = KnownBackend(model or self.model, self.seats)
        heir.name, heir.standstill, heir.counts = self.name, self.standstill, self.counts
        heir.answers = self.answers
        self.heirs.append(heir)
        return heir

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).json()
        if refusal := self.stopped(body):
            await refusal(scope, receive, send)
            return
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
        text = _said(body)
        choices = [{"text": text} if "prompt" in body else {"message": {"content": text}}]
        answer = {"model": body.get("model"), "choices": choices} if status == 200 else {"error": error}
        await JSONResponse(answer, status_code=status)(scope, receive, send)

    def _generate(self, known: dict[str, Any]) -> None:
        prompt = [self._random.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]
        output = [self._random.randrange(VOCABULARY) for _ in range(known.get("tokens", 5))]
        finish = known.get("finish", "stop")
        made = Generation(
            prompt, output, finish, TEXT, queue=QUEUE, gap=GAP, worst_gap=WORST_GAP, engine_seconds=ENGINE_SECONDS
        )
        watch = watching.get()
        if watch:
            watch.sequences.append(FakeSequence(made))
        # What the server asks by itself, of shadows and golden sets, is left out: only what was sent is known.
        if watch is None or not watch.background:
            self.counts.update(prompt=len(prompt), generated=len(output), steps=1)
            self.answers[len(output)] += 1

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
        return [*families, steps, *self._of_requests(labels), *_of_gpu()]

    def _of_requests(self, labels: dict[str, str]) -> list[Metric]:
        """vLLM's histograms of requests that have ended."""
        every = Counter({PROMPT_TOKENS: self.counts["steps"]})
        histograms = {
            "request_prompt_tokens": (LENGTHS, every),
            "request_generation_tokens": (LENGTHS, self.answers),
            "request_prefill_time_seconds": (PHASE_SECONDS, Counter({PREFILL: self.counts["steps"]})),
            "request_decode_time_seconds": (PHASE_SECONDS, Counter({DECODE: self.counts["steps"]})),
        }
        families: list[Metric] = []
        for name, (bounds, values) in histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", "As vLLM has it.", labels=tuple(labels))
            buckets = [(floatToGoString(bound), below(values, bound)) for bound in (*bounds, math.inf)]
            total = sum(value * count for value, count in values.items())
            family.add_metric(tuple(labels.values()), buckets, total)
            families.append(family)
        return families


def _said(body: Mapping[str, Any]) -> str:
    """What the answer to a client, to a judge's question or to a guard's says."""
    if "prompt" in body:
        return TEXT
    messages = body.get("messages") or [{}]
    question = str(messages[-1].get("content", ""))
    if "structured_outputs" in body:
        return next((verdict for words, verdict in VERDICTS.items() if words in question), "none")
    return str(GRADE) if question.startswith("Grade") else TEXT


def below(values: Mapping[float, int], bound: float) -> int:
    """How many of the values lie in the bucket up to this bound, or an earlier one."""
    return sum(count for value, count in values.items() if value <= bound)


def _of_gpu() -> list[Metric]:
    """What Prometheus would scrape from the exporter on a machine with one."""
    families: list[Metric] = []
    for name, value in GPU.items():
        family = GaugeMetricFamily(f"DCGM_FI_DEV_{name}", "As NVIDIA's exporter has it.", labels=("gpu",))
        family.add_metric(("0",), value)
        families.append(family)
    return families
