"""vLLM's own series of each engine, and what it tells of every step."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

from serve.vllm_backend.patches.applying import State
from serve.vllm_backend.step_times import StepTimes

# vLLM registers its series process-wide, so that two engines can't be built at once.
_BUILDING = threading.Lock()


class Pulse(StatLoggerBase):
    """Notes when the engine last took a step, how many requests it had then, and how long its steps take."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.last = 0.0
        self.waiting = 0
        self.step_times = StepTimes()
        self._waits: Mapping[int, Any] = {}

    def observe_waits(self, loggers: Iterable[Any]) -> None:
        """Of vLLM's loggers, beside which this one stands first, take over the histogram of waits between tokens: what
        they observe token by token is observed here once a step."""
        for logger in loggers:
            if isinstance(logger, PrometheusStatLogger):
                self._waits = logger.histogram_inter_token_latency

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self.last = time.monotonic()
        self.step_times.ended(engine_idx)
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs
        if iteration_stats is not None and engine_idx in self._waits:
            observe_all(self._waits[engine_idx], iteration_stats.inter_token_latencies_iter)
            iteration_stats.inter_token_latencies_iter = []

    def log_engine_initialized(self) -> None: ...


def observe_all(histogram: Any, values: Iterable[float]) -> None:
    """What prometheus_client's `observe` does for each value; those of a step are nearly all alike."""
    for value, count in Counter(values).items():
        histogram._sum.inc(value * count)
        histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(count)


class CpuSteps(Collector):
    """Which way an engine's steps went on a CPU, as its workers said last."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts: Counter[tuple[str, str]] = Counter()

    def take(self, workers: Sequence[Sequence[tuple[str, str, int]]]) -> None:
        self._counts = Counter()
        for path, reason, count in (steps for counts in workers for steps in counts):
            self._counts[path, reason] += count

    def collect(self) -> Iterator[Metric]:
        steps = CounterMetricFamily(
            "loradock_cpu_step",
            "Steps on a CPU since the engine started, computed in one call (path fused) or layer by layer, and why; "
            "as of up to 10 seconds ago.",
            labels=("model", "path", "reason"),
        )
        for (path, reason), count in self._counts.items():
            steps.add_metric((self._model, path, reason), count)
        yield steps


class Patches(Collector):
    """What is changed in vLLM, and what is not although this platform and these settings would have it."""

    def __init__(self, model: str, states: Callable[[], Mapping[str, State]]) -> None:
        self._model = model
        self._states = states

    def collect(self) -> Iterator[Metric]:
        series = GaugeMetricFamily(
            "loradock_vllm_patches",
            "Patches of vLLM that this platform and these settings ask for: 1 for one that is on, 0 for one that was "
            "left out (setting vllm_patches) or does not fit this vLLM; `loradock doctor` and /version say why.",
            labels=("model", "patch", "kind"),
        )
        for name, state in self._states().items():
            series.add_metric((self._model, name, state.kind), float(state.on))
        yield series


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
