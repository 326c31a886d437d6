"""Batches, and which bytes of answers count, in the registry's database, where every server that shares it looks.

One server at a time has the claim of a batch, and only with it a line's answer counts: in one transaction with the
counts. So neither a kill nor a second server can answer a line twice or lose one. All methods block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from serve.adapters.registry.tables import batch_answers as answers_table
from serve.adapters.registry.tables import batch_parts as parts_table
from serve.adapters.registry.tables import batches as table
from serve.adapters.registry.work_table import UNCLAIMED, WorkTable
from serve.errors import Conflict, NotFound
from serve.jobs.batches.file_rows import put
from serve.jobs.batches.objects import OPEN, Batch, LineError, Status, StoredFile, Usage
from serve.names import shown

# Answers that are read at a time.
_READ = 50

# Columns that are the fields of a Batch as they are.
_PLAIN = (
    *("id", "tenant", "key", "who", "endpoint", "input_file", "completion_window", "created", "expires"),
    *("file_seconds", "total", "completed", "failed", "output_file", "error_file"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a line: its line of the output, or of the errors."""

    line: int
    completed: bool
    text: str
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Part:
    """A file of answers, of which so many bytes count."""

    batch: str
    tenant: str
    name: str
    nbytes: int


class BatchRows(WorkTable[Batch]):
    """The table of batches."""

    table = table
    what = "batches"
    worked_on = not_ended = OPEN
    under_way = "batches under way"
    limit_code = "batch_limit_exceeded"

    def _values(self, batch: Batch) -> dict[str, Any]:
        plain = {name: getattr(batch, name) for name in _PLAIN}
        usage = batch.usage
        return {
            **plain,
            "status": batch.status.value,
            "metadata": json.dumps(None if batch.metadata is None else dict(batch.metadata)),
            "times": json.dumps(dict(batch.times)),
            "errors": json.dumps([error.described() for error in batch.errors]),
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "generated_tokens": usage.generated,
        }

    def _read(self, row: Row[Any]) -> Batch:
        return Batch(
            **{name: getattr(row, name) for name in _PLAIN},
            status=Status(row.status),
            # By the column: a row has an attribute `metadata` of its own in some versions of SQLAlchemy.
            metadata=json.loads(row._mapping[table.c.metadata]),
            times=json.loads(row.times),
            errors=[LineError(**error) for error in json.loads(row.errors)],
            usage=Usage(row.prompt_tokens, row.cached_tokens, row.generated_tokens),
        )

    def _missing(self, id: str) -> NotFound:
        return NotFound(f"No batch found with id '{shown(id)}'.", param="id")

    def cancel(self, tenant: str, id: str) -> Batch:
        """Ask no more of its lines; Conflict if it is at its end."""
        with self._registry.adding() as connection:
            batch = self._own(connection, tenant, id, lock=True)
            if batch.status not in (Status.VALIDATING, Status.IN_PROGRESS, Status.CANCELLING):
                raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.", param="id")
            if batch.status is not Status.CANCELLING:
                self._reach(connection, batch, Status.CANCELLING)
        return self.get(tenant, id)

    # What the server with the claim writes; None or False, if the claim is another's by now

    def begin(self, id: str, total: int) -> Batch | None:
        """The input is in order, and has so many lines."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return None
            # Cancelled while it was read: it has its lines, and none is asked.
            connection.execute(update(table).where(table.c.id == id).values(total=total))
            if batch.status is Status.VALIDATING:
                self._reach(connection, batch, Status.IN_PROGRESS)
            return self._claimed(connection, id)

    def fail(self, id: str, errors: Sequence[LineError]) -> Status | None:
        """The input is not in order; how the batch ended."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return None
            described = json.dumps([error.described() for error in errors])
            connection.execute(update(table).where(table.c.id == id).values(errors=described))
            status = Status.CANCELLED if batch.status is Status.CANCELLING else Status.FAILED
            self._reach(connection, batch, status)
            return status

    def record(self, id: str, answer: Answer, part: str, nbytes: int) -> bool:
        """A line's answer counts: it is in this part, of which so many bytes count now."""
        with self._registry.adding() as connection:
            if self._claimed(connection, id) is None:
                return False
            here = (parts_table.c.batch == id) & (parts_table.c.name == part)
            if not connection.execute(update(parts_table).where(here).values(nbytes=nbytes)).rowcount:
                connection.execute(insert(parts_table).values(batch=id, name=part, nbytes=nbytes))
            more = {
                "completed": int(answer.completed),
                "failed": int(not answer.completed),
                "prompt_tokens": answer.usage.prompt,
                "cached_tokens": answer.usage.cached,
                "generated_tokens": answer.usage.generated,
            }
            added = {name: table.c[name] + count for name, count in more.items()}
            connection.execute(update(table).where(table.c.id == id).values(added))
        return True

    def recount(self, id: str, completed: int, failed: int) -> None:
        """So many answers are there still."""
        with self._registry.adding() as connection:
            if self._claimed(connection, id) is not None:
                values = {"completed": completed, "failed": failed}
                connection.execute(update(table).where(table.c.id == id).values(values))

    def finalizing(self, id: str) -> Batch | None:
        """No more lines are asked; its files are about to be written."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is not None and batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
                self._reach(connection, batch, Status.FINALIZING)
                batch = self._claimed(connection, id)
            return batch

    def finish(
        self,
        id: str,
        status: Status,
        unanswered: int,
        output: StoredFile | None,
        error: StoredFile | None,
        errors: Sequence[LineError] = (),
    ) -> bool:
        """The batch is at its end, and its files are there: from now on they hold the answers. `errors` say why it did
        not come further."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return False
            for file in filter(None, (output, error)):
                put(connection, file)
            values = {
                "output_file": output.id if output else None,
                "error_file": error.id if error else None,
                "failed": table.c.failed + unanswered,
                "errors": json.dumps([error.described() for error in errors]),
                **UNCLAIMED,
            }
            connection.execute(update(table).where(table.c.id == id).values(values))
            self._reach(connection, batch, status)
            for answered in (answers_table, parts_table):
                connection.execute(delete(answered).where(answered.c.batch == id))
        return True

    # What was answered

    def parts(self, id: str) -> list[Part]:
        """The batch's."""
        return list(self.all_parts(parts_table.c.batch == id))

    def all_parts(self, *where: Any) -> Iterator[Part]:
        """Of all batches that are not at their end."""
        query = select(parts_table, table.c.tenant).join(table, table.c.id == parts_table.c.batch).where(*where)
        with self._registry.reading() as connection:
            rows = connection.execute(query.order_by(parts_table.c.name)).all()
        return (Part(row.batch, row.tenant, row.name, row.nbytes) for row in rows)

    def old_lines(self, id: str) -> list[tuple[int, bool]]:
        """The lines that were answered by a loradock that kept answers in rows, and whether they were completed."""
        query = select(answers_table.c.line, answers_table.c.completed).where(answers_table.c.batch == id)
        with self._registry.reading() as connection:
            return [(row.line, row.completed) for row in connection.execute(query)]

    def old_answers(self, id: str, *, completed: bool) -> Iterator[tuple[int, str]]:
        """Their answers, by line; some at a time are in memory."""
        here, last = answers_table, 0
        while True:
            where = (here.c.batch == id, here.c.completed == completed, here.c.line > last)
            query = select(here.c.line, here.c.answer).where(*where).order_by(here.c.line).limit(_READ)
            with self._registry.reading() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            last = rows[-1].line
            yield from ((row.line, row.answer) for row in rows)

    def _reach(self, connection: Connection, batch: Batch, status: Status) -> None:
        times = json.dumps({**batch.times, status.value: self._clock()})
        connection.execute(update(table).where(table.c.id == batch.id).values(status=status.value, times=times))
