"""Loops as metrics; the adapters are those of the registry that may have labels of their own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.loop.objects import Loop, Outcome, Phase


class LoopMetrics(Collector):
    """`see` hears what the database holds now, the other methods what this server did. `labelled` says of an adapter
    whether it may have labels of its own."""

    def __init__(self, labelled: Callable[[str], bool] = lambda adapter: True) -> None:
        self._labelled = labelled
        self._lock = threading.Lock()
        self._loops: Sequence[Loop] = ()
        self._ended: Counter[tuple[str, str]] = Counter()
        self._forgotten: Counter[str] = Counter()
        self._stopped = False

    def see(self, loops: Sequence[Loop], stopped: bool) -> None:
        """Every loop that has a policy, and whether all of them are stopped."""
        with self._lock:
            self._loops, self._stopped = loops, stopped

    def ended(self, name: str, outcome: Outcome) -> None:
        """A try came to its end."""
        with self._lock:
            self._ended[name, outcome.value] += 1

    def forgot(self, name: str) -> None:
        """A candidate was worse than the live version on what was."""
        with self._lock:
            self._forgotten[name] += 1

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            loops, stopped = list(self._loops), self._stopped
            ended, forgotten = self._ended.copy(), self._forgotten.copy()
        state = GaugeMetricFamily(
            "loradock_loop_state", "1 for the phase that an adapter's loop is in, else 0.", labels=("adapter", "phase")
        )
        failures = GaugeMetricFamily(
            "loradock_loop_failures", "Tries of an adapter's loop in a row that came to nothing.", labels=("adapter",)
        )
        tries = CounterMetricFamily(
            "loradock_loop_tries",
            "Tries of loops that came to their end on this server, by outcome, since it started.",
            labels=("adapter", "outcome"),
        )
        forgetting = CounterMetricFamily(
            "loradock_loop_forgetting",
            "Tries whose candidate was worse by more than the tolerance on an earlier reference or the golden set, "
            "since the server started.",
            labels=("adapter",),
        )
        for loop in loops:
            if not self._labelled(loop.name):
                continue
            for phase in Phase:
                state.add_metric((loop.name, phase.value), float(loop.phase is phase))
            failures.add_metric((loop.name,), loop.state.failures)
            for outcome in Outcome:
                tries.add_metric((loop.name, outcome.value), ended[loop.name, outcome.value])
            forgetting.add_metric((loop.name,), forgotten[loop.name])
        yield from (state, failures, tries, forgetting)
        yield GaugeMetricFamily(
            "loradock_loop_stopped", "1 while all loops are stopped by an operator, else 0.", float(stopped)
        )
