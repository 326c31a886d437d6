"""Conversations that were deleted, as rows that every server of the registry applies to what it keeps itself.

A conversation may have gone on with several servers, each of which keeps the requests that it answered. A row says how
to know them: by their ids, and by what the same asker and the model had said to one another by then. No text is in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import delete, func, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import deleted_conversations as table
from serve.dataset.conversations import HOUR, Captured, Conversations


@dataclass(frozen=True, slots=True)
class Deletion:
    """One deleted conversation. `turns` are digests of what was said by the end of each answer."""

    number: int
    tenant: str
    conversation: str
    ids: frozenset[str]
    turns: frozenset[str]

    def has(self, captured: Captured) -> bool:
        """The request belongs to the conversation."""
        return captured.id in self.ids or not self.turns.isdisjoint(turns_of(captured))


class DeletedConversations:
    """`hours` is for how long servers keep what is captured. All methods block."""

    def __init__(
        self, registry: Registry, conversations: Conversations, hours: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._conversations = conversations
        # A server whose clock is behind keeps it for longer.
        self._seconds = 2 * hours * HOUR + HOUR
        self._clock = clock
        # The last one that was applied here; None: not looked up yet.
        self._applied: int | None = None
        # Those that were noted here, where conversations are told apart: the requests that they name are all.
        self._own: set[int] = set()

    def note(self, tenant: str, gone: Sequence[Captured]) -> None:
        """These requests, a conversation, are about to be deleted here."""
        now = self._clock()
        row = {
            "tenant": tenant,
            "conversation": gone[0].conversation,
            "requests": json.dumps(sorted(captured.id for captured in gone)),
            "turns": json.dumps(sorted({turn for captured in gone for turn in turns_of(captured)})),
            "until": now + self._seconds,
        }
        # One after another on all servers: else one that is committed late has a lower id than those that are applied.
        with self._registry.adding(table.name) as connection:
            connection.execute(delete(table).where(table.c.until < now))
            self._own.add(connection.execute(insert(table).values(row).returning(table.c.id)).scalar_one())

    def apply(self, note: Callable[[str, Sequence[Captured]], None] = lambda tenant, gone: None) -> list[Captured]:
        """Delete here what was deleted anywhere since this was called last; what that was.

        `note` is told what is about to be deleted of a tenant; if it fails it is deleted at the next call.
        """
        applied = self._conversations.last_deletion if self._applied is None else self._applied
        with self._registry.reading() as connection:
            last = connection.scalar(select(func.max(table.c.id))) or 0
            if last < applied:
                applied = 0  # it is another registry, or an earlier one
            if last == applied:
                return []
            query = select(table).where(table.c.id > applied).order_by(table.c.id)
            rows = connection.execute(query).all()
        deletions = [
            Deletion(
                row.id,
                row.tenant,
                row.conversation,
                frozenset(json.loads(row.requests)),
                frozenset(() if row.id in self._own else json.loads(row.turns)),
            )
            for row in rows
        ]
        gone: list[Captured] = []
        for tenant in {deletion.tenant for deletion in deletions}:
            theirs = [deletion for deletion in deletions if deletion.tenant == tenant]
            gone += self._conversations.remove(tenant, partial(_is_of, theirs), note)
        self._applied = max(deletion.number for deletion in deletions)
        self._conversations.note_deletion(self._applied)
        return gone


def turns_of(captured: Captured) -> list[str]:
    """Digests of what the asker and the model had said by the end of each answer; a prompt has none."""
    if isinstance(captured.asked, str):
        return []
    said = [(turn["role"], turn["content"].strip()) for turn in captured.asked]
    said.append(("assistant", captured.answer.strip()))
    turns = []
    running = hashlib.blake2b(captured.asker.encode(), digest_size=16)
    for role, content in said:
        running.update(json.dumps([role, content]).encode())
        turns += [running.hexdigest()] if role == "assistant" else []
    return turns


def _is_of(deletions: Iterable[Deletion], captured: Captured) -> bool:
    return any(deletion.has(captured) for deletion in deletions)
