"""What builds of an adapter held out, so that no later one trains on it: conversations, and sketches of questions.

A file of JSON lines an adapter. No text is in it, but a sketch of a short text says what the text is: so an entry goes
when its conversation is deleted, and after `days`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.dataset.near import Sketch
from serve.files import write_whole

DAY = 86_400.0
# Of one adapter; the latest are kept.
MOST = 20_000


class HeldOut:
    """All methods block; one thread at a time changes an adapter's file."""

    def __init__(self, folder: Path, days: float) -> None:
        self._folder, self._seconds = folder, days * DAY

    def entries(self, adapter: str, now: float) -> list[tuple[str, Sketch]]:
        """Conversations with a question each."""
        return [(row["conversation"], _sketch(row)) for row in self._rows(adapter, now)]

    def add(self, adapter: str, entries: Sequence[tuple[str, Sketch]], now: float) -> None:
        """These were held out now."""
        fresh = {(conversation, one.exact.hex()): _row(conversation, one, now) for conversation, one in entries}
        old = [row for row in self._rows(adapter, now) if (row["conversation"], row["exact"]) not in fresh]
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(self._path(adapter), [*old, *fresh.values()][-MOST:])

    def forget(self, conversation: str) -> None:
        """The conversation was deleted."""
        for file in self._folder.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_bytes().splitlines()]
            kept = [row for row in rows if row["conversation"] != conversation]
            if len(kept) < len(rows):
                _write(file, kept)

    def _rows(self, adapter: str, now: float) -> list[dict[str, Any]]:
        try:
            lines = self._path(adapter).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["moment"] > now - self._seconds]

    def _path(self, adapter: str) -> Path:
        return self._folder / f"{hashlib.sha256(adapter.encode()).hexdigest()[:24]}.jsonl"


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(conversation: str, one: Sketch, now: float) -> dict[str, Any]:
    shingles = base64.b64encode(one.shingles.astype("<u8").tobytes()).decode()
    held = {"exact": one.exact.hex(), "shingles": shingles, "bound": int(one.bound)}
    return {"conversation": conversation, "moment": now, **held}


def _sketch(row: dict[str, Any]) -> Sketch:
    shingles = np.frombuffer(base64.b64decode(row["shingles"]), "<u8").astype(np.uint64)
    return Sketch(bytes.fromhex(row["exact"]), shingles, np.uint64(row["bound"]))
