"""What builds of an adapter held out, so that no later one trains on it: conversations, and sketches of questions.

In the registry's database, since the next build may be another server's. No text is in it, but a sketch of a short text
says what the text is: so an entry goes when its conversation is deleted, and after `days`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import bindparam, delete, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import held_out as table
from serve.dataset.near import Sketch

DAY = 86_400.0
# Of one adapter; the latest are kept.
MOST = 20_000


class HeldOut:
    """All methods block."""

    def __init__(self, registry: Registry, days: float) -> None:
        self._registry = registry
        self._seconds = days * DAY

    def entries(self, adapter: str, now: float) -> list[tuple[str, Sketch]]:
        """Conversations with a question each."""
        query = select(table).where(table.c.adapter == _key(adapter), table.c.moment > now - self._seconds)
        with self._registry.reading() as connection:
            rows = connection.execute(query.order_by(table.c.id)).all()
        return [(row.conversation, _sketch(row.exact, json.loads(row.sketch))) for row in rows]

    def add(self, adapter: str, entries: Sequence[tuple[str, Sketch]], now: float) -> None:
        """These were held out now."""
        key = _key(adapter)
        rows = {(conversation, one.exact): _row(key, conversation, one, now) for conversation, one in entries}
        if not rows:
            return
        mine = table.c.adapter == key
        same = delete(table).where(mine, table.c.conversation == bindparam("of"), table.c.exact == bindparam("asked"))
        surplus = select(table.c.id).where(mine).order_by(table.c.id.desc()).offset(MOST)
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(mine, table.c.moment <= now - self._seconds))
            connection.execute(same, [{"of": row["conversation"], "asked": row["exact"]} for row in rows.values()])
            connection.execute(insert(table), list(rows.values()))
            if (last := connection.scalar(surplus.limit(1))) is not None:
                connection.execute(delete(table).where(mine, table.c.id <= last))

    def forget(self, conversation: str) -> None:
        """The conversation was deleted."""
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.conversation == conversation))

    def adopt(self, folder: Path) -> None:
        """Take over what an earlier release had in files, of JSON lines."""
        for file in sorted(folder.glob("*.jsonl")):
            rows = [json.loads(line) for line in file.read_bytes().splitlines()]
            with self._registry.adding() as connection:
                for row in rows:
                    known = {"adapter": file.stem, "conversation": row["conversation"], "moment": row["moment"]}
                    sketch = {"shingles": row["shingles"], "bound": row["bound"]}
                    connection.execute(insert(table).values(**known, exact=row["exact"], sketch=json.dumps(sketch)))
            file.unlink()


def _key(adapter: str) -> str:
    return hashlib.sha256(adapter.encode()).hexdigest()[:24]


def _row(key: str, conversation: str, one: Sketch, now: float) -> dict[str, Any]:
    shingles = base64.b64encode(one.shingles.astype("<u8").tobytes()).decode()
    sketch = json.dumps({"shingles": shingles, "bound": int(one.bound)})
    return {"adapter": key, "conversation": conversation, "moment": now, "exact": one.exact.hex(), "sketch": sketch}


def _sketch(exact: str, row: dict[str, Any]) -> Sketch:
    shingles = np.frombuffer(base64.b64decode(row["shingles"]), "<u8").astype(np.uint64)
    return Sketch(bytes.fromhex(exact), shingles, np.uint64(row["bound"]))
