"""What a step is handed, and how it says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from optimize.options import Evaluate, Text


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gets: the model and adapters as they are by now, and where its own go.

    `originals` are the adapters as they fit the reference, before any step rewrote them.
    """

    kind: str
    options: dict[str, Any]
    model: str
    base: str
    reference: str
    adapters: dict[str, str]
    originals: dict[str, str]
    calibration: Text
    evaluate: Evaluate
    seed: int
    target: str
    out: str

    @property
    def folder(self) -> Path:
        return Path(self.out)


class Progress:
    """`progress(done, total, what)`; said at most five times a second, but the end always."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._said = 0.0

    def __call__(self, done: float, total: float, what: str = "") -> None:
        now = time.monotonic()
        if now - self._said > 0.2 or done >= total:
            self._said = now
            self._tell({"done": done, "total": total, "what": what})
