"""Conversations that were deleted, as rows that every server of the registry applies to what it keeps itself.

A conversation may have gone on with several servers, each of which keeps the requests that it answered. A row says how
to know them: by their ids, and by what the same asker and the model had said to one another by then. No text is in it.

Others begin alike, so what counts is who answered: a request belongs to the conversation if its answer is repeated
there, or if it repeats an answer that was given there, and not one that was given later to another conversation.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import deleted_conversations as table
from serve.dataset.conversations import HOUR, Captured, Conversations

# What clocks of servers may differ by.
SKEW = 60.0


@dataclass(frozen=True, slots=True)
class Deletion:
    """One deleted conversation. `turns` are digests of what was said by the end of each answer.

    `answered`: the turns that were answered where it was deleted, and when; none of a row of an earlier release.
    """

    number: int
    tenant: str
    conversation: str
    ids: frozenset[str]
    turns: frozenset[str]
    answered: Mapping[str, float]

    def has(self, captured: Captured, turns: Sequence[str], others: Mapping[str, float]) -> bool:
        """The request, with these turns, belongs to the conversation. `others`: turns that another one answered here
        before it, and when."""
        if captured.id in self.ids or not turns:
            return captured.id in self.ids
        if not self.answered:
            return not self.turns.isdisjoint(turns)
        *earlier, last = turns
        if last in self.turns and (earlier or last not in self.answered):
            return True  # two that have the same first answer are two conversations
        repeated = next((turn for turn in reversed(earlier) if turn in self.answered), None)
        if repeated is None:
            return False
        moment = self.answered[repeated]
        if repeated in others:
            return others[repeated] < moment <= captured.moment
        return moment <= captured.moment + SKEW


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

    def note(self, tenant: str, gone: Sequence[Captured]) -> None:
        """These requests, a conversation, are about to be deleted here."""
        now = self._clock()
        row = {
            "tenant": tenant,
            "conversation": gone[0].conversation,
            "requests": json.dumps(sorted(captured.id for captured in gone)),
            "turns": json.dumps(sorted({turn for captured in gone for turn in _noted(captured)})),
            "until": now + self._seconds,
        }
        # One after another on all servers: else one that is committed late has a lower id than those that are applied.
        with self._registry.adding(table.name) as connection:
            connection.execute(delete(table).where(table.c.until < now))
            connection.execute(insert(table).values(row))

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
        deletions = [_deletion(row) for row in rows]
        gone: list[Captured] = []
        for tenant in {deletion.tenant for deletion in deletions}:
            theirs = [deletion for deletion in deletions if deletion.tenant == tenant]
            gone += self._conversations.remove(tenant, _Search(theirs).has, note)
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


class _Search:
    """For requests of deleted conversations of a tenant's, among those of this server, the earliest first."""

    def __init__(self, deletions: Sequence[Deletion]) -> None:
        self._deletions = deletions
        self._answered = {turn for deletion in deletions for turn in deletion.answered}
        # When another conversation had the same answer here.
        self._others: dict[str, float] = {}

    def has(self, captured: Captured) -> bool:
        turns = turns_of(captured)
        if any(deletion.has(captured, turns, self._others) for deletion in self._deletions):
            return True
        if turns and turns[-1] in self._answered:
            self._others[turns[-1]] = captured.moment
        return False


def _noted(captured: Captured) -> list[str]:
    """Its turns; the last one, which was answered here, also with the time, in a form that no earlier release finds."""
    turns = turns_of(captured)
    return [*turns, f"{turns[-1]} {captured.moment}"] if turns else []


def _deletion(row: Row[Any]) -> Deletion:
    noted = [turn.partition(" ") for turn in json.loads(row.turns)]
    answered: dict[str, float] = {}
    for turn, _, moment in noted:
        if moment:
            answered[turn] = min(float(moment), answered.get(turn, math.inf))
    ids = frozenset(json.loads(row.requests))
    return Deletion(row.id, row.tenant, row.conversation, ids, frozenset(turn for turn, _, _ in noted), answered)
