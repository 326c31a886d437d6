"""Fine-tuning as metrics; the labels are fixed sets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.events import JobEnded
from serve.jobs.finetuning.objects import ENDS, OPEN, Job
from serve.jobs.finetuning.training_process import TrainingProcess

# A worker that has said nothing for so long is not counted.
WORKER_SECONDS = 60.0


class FineTuningMetrics(Collector):
    """`see` hears what the database holds now, the other methods what this server did."""

    def __init__(self, process: TrainingProcess) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._tokens = self._seconds = 0.0
        self._workers: dict[str, float] = {}

    def see(self, jobs: Sequence[Job]) -> None:
        """Every job that is not at its end."""
        with self._lock:
            self._open = Counter(job.status.value for job in jobs)

    def count(self, event: JobEnded) -> None:
        """A job came to its end."""
        with self._lock:
            self._ended[event.status] += 1

    def trained(self, tokens: int, seconds: float) -> None:
        """So many tokens more, in so many seconds of running."""
        with self._lock:
            self._tokens += max(0, tokens)
            self._seconds += seconds

    def heard_of(self, worker: str) -> None:
        """A machine that trains for this server has spoken."""
        with self._lock:
            now = time.monotonic()
            self._workers = {name: at for name, at in self._workers.items() if now - at < WORKER_SECONDS}
            self._workers[worker] = now

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            open_jobs, ended = self._open.copy(), self._ended.copy()
            tokens, seconds = self._tokens, self._seconds
            now = time.monotonic()
            workers = sum(now - at < WORKER_SECONDS for at in self._workers.values())
        jobs = GaugeMetricFamily(
            "loradock_finetune_jobs",
            "Fine-tuning jobs of all servers that are not at their end, by status.",
            labels=("status",),
        )
        for status in OPEN:
            jobs.add_metric((status.value,), open_jobs[status.value])
        ends = CounterMetricFamily(
            "loradock_finetune_jobs_ended",
            "Fine-tuning jobs that came to their end on this server, by status, since it started.",
            labels=("status",),
        )
        for status in ENDS:
            ends.add_metric((status.value,), ended[status.value])
        yield from (jobs, ends)
        yield CounterMetricFamily(
            "loradock_finetune_tokens",
            "Tokens that fine-tuning jobs trained on, workers' included, since the server started.",
            tokens,
        )
        yield CounterMetricFamily(
            "loradock_finetune_running_seconds",
            "Seconds for which fine-tuning jobs ran and were not suspended, workers' included, since it started.",
            seconds,
        )
        yield GaugeMetricFamily(
            "loradock_finetune_suspended",
            "1 while a fine-tuning job is suspended because clients are answered, when it is scraped; else 0.",
            float(self._process.suspended),
        )
        yield GaugeMetricFamily(
            "loradock_finetune_workers",
            "Workers on other machines that this server has heard of within the last minute.",
            workers,
        )
