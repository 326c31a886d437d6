"""Events and checkpoints of jobs, as rows of the registry's database. All of it blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import finetune_notes as table
from serve.adapters.registry.work_table import Page
from serve.errors import BadRequest
from serve.jobs.finetuning.objects import Checkpoint, Event
from serve.names import shown

EVENT, CHECKPOINT = "event", "checkpoint"
# What its id says of an event or a checkpoint: the job, and its number there.
_ID = re.compile(r"ft(?:event|ckpt)-([0-9a-f]+)-([0-9]{1,9})")


class Notes:
    """What is read of them, the latest first."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def events(self, job: str, *, after: str | None, limit: int) -> Page[Event]:
        rows = self._page(job, EVENT, after, limit)
        events = [Event(job, row.number, row.when, **json.loads(row.content)) for row in rows[:limit]]
        return Page(events, len(rows) > limit)

    def checkpoints(self, job: str, *, after: str | None, limit: int) -> Page[Checkpoint]:
        rows = self._page(job, CHECKPOINT, after, limit)
        found = [Checkpoint(job, row.number, row.when, **json.loads(row.content)) for row in rows[:limit]]
        return Page(found, len(rows) > limit)

    def _page(self, job: str, kind: str, after: str | None, limit: int) -> list[Any]:
        """One more than `limit`, if there is one."""
        query = select(table).where(table.c.job == job, table.c.kind == kind)
        if after is not None:
            named = _ID.fullmatch(after)
            if named is None or f"ftjob-{named[1]}" != job:
                raise BadRequest(f"after takes an id of this list, not {shown(after)}", param="after")
            query = query.where(table.c.number < int(named[2]))
        with self._registry.reading() as connection:
            return [*connection.execute(query.order_by(table.c.number.desc()).limit(limit + 1))]


def add_event(
    connection: Connection,
    job: str,
    when: float,
    message: str,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
) -> None:
    """The job's next event."""
    here = (table.c.job == job, table.c.kind == EVENT)
    number = (connection.scalar(select(func.max(table.c.number)).where(*here)) or 0) + 1
    content = {"level": level, "message": message, "data": data}
    connection.execute(insert(table).values(_row(job, EVENT, number, when, content)))


def add_checkpoint(connection: Connection, checkpoint: Checkpoint) -> None:
    """In the place of an earlier one of this step."""
    here = (table.c.job == checkpoint.job, table.c.kind == CHECKPOINT, table.c.number == checkpoint.step)
    connection.execute(delete(table).where(*here))
    content = {"model": checkpoint.model, "metrics": dict(checkpoint.metrics)}
    connection.execute(
        insert(table).values(_row(checkpoint.job, CHECKPOINT, checkpoint.step, checkpoint.when, content))
    )


def _row(job: str, kind: str, number: int, when: float, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"job": job, "kind": kind, "number": number, "when": when, "content": json.dumps(content)}
