"""What a step is given, and how it reports its progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from optimize.options import Evaluate, Text


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gets: the model and adapters as they are by now, and where its own go.

    `originals` are the adapters as they fit the reference, before any step rewrote them. In the folder `watched`, where
    there is one, a step leaves what others look at while it runs. `device` is torch's name of where it computes, and
    `memory` the bytes that it may have, or 0 without a bound.
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
    watched: str = ""
    device: str = "cpu"
    memory: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.out)


class Progress:
    """`progress(done, total, what)`; sent at most five times a second, and always at the end."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._sent_at = 0.0

    def __call__(self, done: float, total: float, what: str = "") -> None:
        now = time.monotonic()
        if now - self._sent_at > 0.2 or done >= total:
            self._sent_at = now
            self._tell({"done": done, "total": total, "what": what})
