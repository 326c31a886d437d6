"""References of loops in the registry's database: examples that nobody trains on, and what was deleted of them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields

from sqlalchemy import delete, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import loop_deletions as deletions
from serve.adapters.registry.tables import loop_references as table
from serve.loop.likelihood import Example
from serve.loop.objects import Loop, Reference

REFERENCES_KEPT = 12
_REFERENCE = tuple(field.name for field in fields(Reference))


class ReferenceRows:
    """The table of references. All of it blocks."""

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock

    def hold_out(self, loop: Loop, examples: Sequence[Example], label: str | None = None) -> str:
        """Keep examples that nobody trains on; without a label for the try that goes on. Their id."""
        id = f"ref-{secrets.token_hex(8)}"
        row = {"id": id, "loop": loop.id, "number": loop.state.number, "label": label, "made": self._clock()}
        document, clusters = _document(examples), _clusters(examples)
        with self._registry.adding() as connection:
            if label is None:
                mine = (table.c.loop == loop.id, table.c.label.is_(None))
                connection.execute(delete(table).where(*mine))
            connection.execute(
                insert(table).values(**row, examples=len(examples), document=document, clusters=clusters)
            )
        return id

    def keep(self, loop: Loop, id: str, label: str, score: float | None) -> None:
        """A version became live that was proved on these: later ones must not lose it. The oldest ones make room."""
        mine = table.c.loop == loop.id
        with self._registry.adding() as connection:
            values = {"label": label, "score": score}
            connection.execute(update(table).where(table.c.id == id).values(**values))
            order = table.c.made.desc(), table.c.id
            kept = select(table.c.id).where(mine, table.c.label.is_not(None)).order_by(*order)
            old = list(connection.scalars(kept.offset(REFERENCES_KEPT)))
            connection.execute(delete(table).where(table.c.id.in_(old)))

    def kept(self, loop: Loop) -> list[Reference]:
        """Of versions that became live, the oldest first."""
        columns = [table.c[name] for name in _REFERENCE]
        query = select(*columns).where(table.c.loop == loop.id, table.c.label.is_not(None))
        with self._registry.reading() as connection:
            rows = connection.execute(query.order_by(table.c.made, table.c.id)).mappings()
            return [Reference(**row) for row in rows]

    def examples(self, id: str) -> list[Example]:
        """The examples of a reference, in the order of their digests."""
        with self._registry.reading() as connection:
            row = connection.execute(select(table.c.document, table.c.clusters).where(table.c.id == id)).first()
        return sorted(_examples(*row) if row else [], key=lambda example: example.digest)

    def forget_conversation(self, loop: Loop, id: str, digests: Collection[str] = ()) -> int:
        """Drop the examples of a conversation that was deleted; how many there were. What comes from a training file
        has no conversation's id: it is told by its digest."""
        gone = 0
        with self._registry.adding() as connection:
            query = select(table.c.id, table.c.document, table.c.clusters).where(table.c.loop == loop.id)
            for row in connection.execute(query.with_for_update()).all():
                there = _examples(row.document, row.clusters)
                kept = [one for one in there if one.conversation != id and one.digest not in digests]
                if len(kept) < len(there):
                    gone += len(there) - len(kept)
                    values = {"examples": len(kept), "document": _document(kept), "clusters": _clusters(kept)}
                    connection.execute(update(table).where(table.c.id == row.id).values(**values))
        return gone

    def note_deleted(self, tenant: str, digests: Collection[str], until: float) -> None:
        """Examples with these digests were deleted, and files from before may hold them until then."""
        columns = deletions.c
        with self._registry.adding(tenant) as connection:
            connection.execute(delete(deletions).where(columns.until < self._clock()))
            for digest in sorted(digests):
                here = (columns.tenant == tenant, columns.digest == digest)
                before = connection.scalar(select(columns.until).where(*here))
                connection.execute(delete(deletions).where(*here))
                row = {"tenant": tenant, "digest": digest, "until": max(until, before or 0.0)}
                connection.execute(insert(deletions).values(**row))

    def deleted(self, tenant: str) -> set[str]:
        """Digests of the tenant's examples that were deleted."""
        columns = deletions.c
        with self._registry.reading() as connection:
            return set(connection.scalars(select(columns.digest).where(columns.tenant == tenant)))

    def drop(self, loop: Loop, id: str) -> bool:
        """Forget a reference; whether there was one."""
        reference = (table.c.id == id, table.c.loop == loop.id, table.c.label.is_not(None))
        with self._registry.adding() as connection:
            return connection.execute(delete(table).where(*reference)).rowcount > 0


def _document(examples: Sequence[Example]) -> str:
    return json.dumps([[example.fields, example.conversation] for example in examples], ensure_ascii=False)


def _clusters(examples: Sequence[Example]) -> str:
    """A number for each, the same for those that count as one: it says nothing of who asked."""
    numbers: dict[str, int] = {}
    return json.dumps([numbers.setdefault(example.counted_as, len(numbers)) for example in examples])


def _examples(document: str | None, clusters: str | None) -> list[Example]:
    """Earlier releases, which may have written one of the two since, know no clusters."""
    examples = json.loads(document or "[]")
    numbers = [str(number) for number in json.loads(clusters or "[]")]
    if len(numbers) != len(examples):
        numbers = [""] * len(examples)
    return [Example(fields, asked, number) for (fields, asked), number in zip(examples, numbers, strict=True)]
