"""Batches as metrics; the labels are fixed sets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.jobs.batches.objects import OPEN, Batch, Status

RESULTS = ("completed", "failed", "expired", "cancelled")


class BatchMetrics(Collector):
    """`see` and `keeps` hear what the database holds now, `counted` and `ended` what this server did.

    `clock` is the time of day, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._lock, self._clock = threading.Lock(), clock
        self._lines = dict.fromkeys(RESULTS, 0)
        self._ended = dict.fromkeys(RESULTS, 0)
        self._open: Counter[str] = Counter()
        self._left = 0
        # When the oldest of the open ones came.
        self._oldest: float | None = None
        self._files = (0, 0)

    def counted(self, result: str, number: int) -> None:
        """So many lines came to this result."""
        with self._lock:
            self._lines[result] += number

    def ended(self, status: Status) -> None:
        """A batch came to its end."""
        with self._lock:
            self._ended[status.value] += 1

    def see(self, batches: Sequence[Batch]) -> None:
        """Every batch that is not at its end."""
        with self._lock:
            self._open = Counter(batch.status.value for batch in batches)
            self._left = sum(batch.total - batch.completed - batch.failed for batch in batches)
            self._oldest = min((batch.created for batch in batches), default=None)

    def keeps(self, files: int, nbytes: int) -> None:
        with self._lock:
            self._files = (files, nbytes)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            lines = dict(self._lines)
            ended = dict(self._ended)
            open_batches = self._open.copy()
            left = self._left
            oldest = self._oldest
            files = self._files
        answered = CounterMetricFamily(
            "loradock_batch_lines",
            "Lines of batches by result (completed, failed, expired, cancelled), since the server started.",
            labels=("result",),
        )
        for result, count in lines.items():
            answered.add_metric((result,), count)
        ends = CounterMetricFamily(
            "loradock_batches_ended",
            "Batches that this server brought to their end, by status, since it started. failed: a line of the input "
            "is no request.",
            labels=("status",),
        )
        for status, count in ended.items():
            ends.add_metric((status,), count)
        gauge = GaugeMetricFamily(
            "loradock_batches", "Batches of all servers that are not at their end, by status.", labels=("status",)
        )
        for phase in OPEN:
            gauge.add_metric((phase.value,), open_batches[phase.value])
        yield from (answered, ends, gauge)
        yield GaugeMetricFamily(
            "loradock_batch_lines_left", "Lines of open batches of all servers that have no answer yet.", left
        )
        yield GaugeMetricFamily(
            "loradock_batch_oldest_seconds",
            "Seconds since the oldest open batch of all servers was made, when it is scraped; 0 without one.",
            0.0 if oldest is None else max(0.0, self._clock() - oldest),
        )
        yield GaugeMetricFamily("loradock_files", "Files of all tenants that batches read or wrote.", files[0])
        yield GaugeMetricFamily(
            "loradock_files_bytes", "Bytes of all tenants' files that batches read or wrote.", files[1]
        )
