"""Batches as metrics; the labels are fixed sets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.gateway.batches.objects import OPEN, Batch

RESULTS = ("completed", "failed", "expired", "cancelled")


class BatchMetrics(Collector):
    """`see` and `keeps` hear what the database holds now, `counted` what this server did."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines = dict.fromkeys(RESULTS, 0)
        self._open: Counter[str] = Counter()
        self._left = 0
        self._files = (0, 0)

    def counted(self, result: str, number: int) -> None:
        """So many lines came to this result."""
        with self._lock:
            self._lines[result] += number

    def see(self, batches: Sequence[Batch]) -> None:
        """Every batch that is not at its end."""
        with self._lock:
            self._open = Counter(batch.status.value for batch in batches)
            self._left = sum(batch.total - batch.completed - batch.failed for batch in batches)

    def keeps(self, files: int, nbytes: int) -> None:
        with self._lock:
            self._files = (files, nbytes)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            lines, open_batches, left, files = dict(self._lines), self._open.copy(), self._left, self._files
        counter = CounterMetricFamily(
            "loradock_batch_lines",
            "Lines of batches by result (completed, failed, expired, cancelled), since the server started.",
            labels=("result",),
        )
        for result, count in lines.items():
            counter.add_metric((result,), count)
        gauge = GaugeMetricFamily(
            "loradock_batches", "Batches of all servers that are not at their end, by status.", labels=("status",)
        )
        for status in OPEN:
            gauge.add_metric((status.value,), open_batches[status.value])
        yield from (counter, gauge)
        yield GaugeMetricFamily(
            "loradock_batch_lines_left", "Lines of open batches of all servers that have no answer yet.", left
        )
        yield GaugeMetricFamily("loradock_files", "Files of all tenants that batches read or wrote.", files[0])
        yield GaugeMetricFamily(
            "loradock_files_bytes", "Bytes of all tenants' files that batches read or wrote.", files[1]
        )
