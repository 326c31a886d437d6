"""Versions whose alarms nobody has acknowledged yet, while they are not in memory: after a restart, or unloaded.

Each is a file beside the version's baseline with its last report, so that API and metrics show it as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from serve.drift.baseline_files import BaselineFiles

FILE = "alarms.json"


@dataclass(frozen=True, slots=True)
class OpenAlarms:
    """What is kept of a version with alarms. alarmed: when (seconds), by signal; moved: what, by signal."""

    adapter: str
    version: str
    id: str
    base: str
    alarmed: dict[str, float]
    moved: dict[str, dict[str, Any]]
    report: dict[str, Any]

    @property
    def key(self) -> str:
        return self.id or self.adapter


class UnloadedAlarms:
    """`exists(adapter, id)`: whether there still is such a version. Not for the event loop."""

    def __init__(self, files: BaselineFiles, exists: Callable[[str, str], bool]) -> None:
        self._files = files
        self._exists = exists
        self._lock = threading.Lock()
        self._unloaded: dict[str, OpenAlarms] = {}

    def __iter__(self) -> Iterator[OpenAlarms]:
        with self._lock:
            every = list(self._unloaded.values())
        return (alarms for alarms in every if self._exists(alarms.adapter, alarms.id))

    def read(self) -> None:
        """All that were open when the server stopped."""
        for notes in self._files.every(FILE):
            if alarms := _read(notes):
                self.unloaded(alarms)

    def write(self, alarms: OpenAlarms) -> None:
        """Keep a version's open alarms on the disk; without any, no file."""
        self._files.save_notes(alarms.adapter, alarms.id, FILE, asdict(alarms) if alarms.alarmed else None)

    def unloaded(self, alarms: OpenAlarms) -> None:
        """A version leaves the memory."""
        if alarms.alarmed:
            with self._lock:
                self._unloaded[alarms.key] = alarms

    def loaded(self, adapter: str, id: str) -> OpenAlarms | None:
        """A version is in memory again: its open alarms, which are its own business from now on."""
        with self._lock:
            self._unloaded.pop(id or adapter, None)
        notes = self._files.notes(adapter, id, FILE)
        return _read(notes) if notes else None

    def forget(self, adapter: str, id: str) -> None:
        """The version was removed."""
        with self._lock:
            self._unloaded.pop(id or adapter, None)


def _read(notes: dict[str, Any]) -> OpenAlarms | None:
    try:
        return OpenAlarms(**notes)
    except TypeError:  # another release keeps something else
        return None
