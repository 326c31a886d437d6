"""The tasks that run as long as the server does. None ends unseen: one that fails is started again.

While a task fails, `/ready` says so, and `loradock_background_task_failures_total{task}` counts it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

# Before the first new start; each further one in a row waits twice as long.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
# A task that has run for so long since it was started again is well.
WELL_SECONDS = 10.0


@dataclass(slots=True)
class _State:
    failures: int = 0
    in_a_row: int = 0
    problem: str = ""
    # When it was started; None while it waits to be.
    started: float | None = None


class BackgroundTasks(Collector):
    """For one event loop; `collect` is for any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Have `run` running until `stop`: it is called again whenever it raises or returns."""
        state = self._states[name] = _State()
        self._tasks.append(asyncio.create_task(self._keep_running(name, run, state), name=name))

    async def stop(self) -> None:
        """Cancel all of them and wait for their ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def problems(self) -> dict[str, str]:
        """Why those tasks failed that are not well again yet, by name."""
        return {name: state.problem for name, state in list(self._states.items()) if not self._is_well(state)}

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "loradock_background_task_failures",
            "Times that a background task ended by an error and was started again, since the server started.",
            labels=("task",),
        )
        for name, state in list(self._states.items()):
            failures.add_metric((name,), state.failures)
        yield failures

    async def _keep_running(self, name: str, run: Callable[[], Awaitable[None]], state: _State) -> None:
        while True:
            state.started = self._clock()
            try:
                await run()
                problem = "it ended by itself"
                log.error("the background task %s ended by itself", name)
            except Exception as error:  # whatever it is: the task is started again, and everybody sees that
                problem = f"{type(error).__name__}: {error}"
                log.exception("the background task %s failed", name)
            state.in_a_row = 1 if self._is_well(state) else state.in_a_row + 1
            state.started, state.problem = None, problem
            state.failures += 1
            await asyncio.sleep(min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** (state.in_a_row - 1)))

    def _is_well(self, state: _State) -> bool:
        if not state.problem:
            return True
        return state.started is not None and self._clock() - state.started > WELL_SECONDS
