"""vLLM's own series of each engine, and what it tells of every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from serve.vllm_backend.step_times import StepTimes

# vLLM registers its series process-wide, so that two engines can't be built at once.
_BUILDING = threading.Lock()


class Pulse(StatLoggerBase):
    """Notes when the engine last took a step, how many requests it had then, and how long its steps take."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.last = 0.0
        self.waiting = 0
        self.step_times = StepTimes()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self.last = time.monotonic()
        self.step_times.ended(engine_idx)
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs

    def log_engine_initialized(self) -> None: ...


@contextmanager
def own_series(own: CollectorRegistry) -> Iterator[None]:
    """What is registered as `vllm:*` inside the block goes to `own`, and what others had registered stays theirs.

    vLLM takes every such series out of the process's registry when it builds an engine, also those of another engine.
    """
    with _BUILDING:
        kept = _vllm_series()
        for collector in kept:
            REGISTRY.unregister(collector)
        try:
            yield
        finally:
            for collector in _vllm_series():
                REGISTRY.unregister(collector)
                own.register(collector)
            for collector in kept:
                REGISTRY.register(collector)


def _vllm_series() -> list[Collector]:
    return [
        collector
        for collector in list(REGISTRY._collector_to_names)
        if getattr(collector, "_name", "").startswith("vllm:")
    ]
