"""Signals reach the step that runs: SIGTERM ends it after what it can save, SIGTSTP and SIGCONT suspend it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Protocol

from optimize.errors import Stopped

SENTENCE = "stopped; what is done is kept, go on with --resume"


class Process(Protocol):
    """The process of a step."""

    pid: int
    returncode: int | None

    def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


class Signals:
    """While this is entered, in the main thread, SIGTERM raises Stopped here, or goes to the step that runs."""

    def __init__(self) -> None:
        self._step: Process | None = None
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._end, signal.SIGTSTP: self._suspend, signal.SIGCONT: self._go_on}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def running(self, step: Process | None) -> None:
        """A step's process has begun, or the one before has ended."""
        if step is not None and self._asked:
            raise Stopped(SENTENCE)
        self._step = step

    def _end(self, _: int, __: FrameType | None) -> None:
        self._asked = True
        if self._step is None:
            raise Stopped(SENTENCE)
        self._step.send_signal(signal.SIGTERM)

    def _suspend(self, _: int, __: FrameType | None) -> None:
        if self._step is not None:
            self._step.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _go_on(self, _: int, __: FrameType | None) -> None:
        if self._step is not None:
            self._step.send_signal(signal.SIGCONT)
