"""A version answers what was asked before, in the gaps of traffic and unseen, and is compared with what was answered.

Nothing of it is kept. Answers are drawn greedily, one at a time, behind every client.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serve.adapters.adapter import Adapter
from serve.dataset.conversations import Captured
from serve.dataset.near import bared
from serve.engine.payer import Payer
from serve.models.refusals import refuses
from serve.rollout.canary.shadow_agreement import Agreement, agreement
from serve.rollout.golden.golden_runner import GoldenRunner, Refused
from serve.rollout.golden.golden_set import CHAT, TEXT, Judge, asked

# What is shown of a question and of each answer, in characters; a question's end is what was asked last.
SHOWN = 600


@dataclass(frozen=True, slots=True)
class Replayed:
    """A request with the answer that it is compared with, and the candidate's. Grades are a judge's, from 0 to 1."""

    request: Captured
    other: str
    answer: str
    agreement: Agreement
    grades: tuple[float, float] | None = None

    @property
    def rating(self) -> float | None:
        """What people said of this very answer; None if they said nothing of it."""
        said = self.request
        if said.correction is not None and bared(self.answer) == bared(said.correction):
            return 1.0
        if bared(self.answer) != bared(said.answer):
            return None
        return said.rating if said.correction is None else 0.0

    @property
    def kept_rating(self) -> float | None:
        """What people said of the answer that was given."""
        said = self.request
        if said.correction is None:
            return said.rating
        return float(bared(said.answer) == bared(said.correction))


def chosen(rows: Iterable[Captured], count: int) -> list[Captured]:
    """One request of a conversation, those first that somebody said something of, then the latest."""
    latest: dict[str, Captured] = {}
    for row in rows:  # the latest come first
        known = latest.get(row.conversation)
        if known is None or (not _said_of(known) and _said_of(row)):
            latest[row.conversation] = row
    return sorted(latest.values(), key=lambda row: (not _said_of(row), -row.moment, row.id))[:count]


async def replay(
    runner: GoldenRunner,
    candidate: Adapter,
    requests: Sequence[Captured],
    *,
    against: Adapter | None,
    max_tokens: int,
    judge: Judge | None,
    payer: Payer,
    goes_on: Callable[[], Any],
) -> tuple[list[Replayed], Counter[str]]:
    """What was answered, and why some requests were not, counted.

    `against` is the version whose answers are compared; None: the kept ones. `goes_on()` is awaited before each
    request; after False nothing more is asked.
    """
    replayed: list[Replayed] = []
    refused: Counter[str] = Counter()
    for request in requests:
        if not await goes_on():
            break
        question = {"prompt": request.asked} if isinstance(request.asked, str) else {"messages": request.asked}
        fields = {**question, "max_tokens": max_tokens, "temperature": 0, "stream": False}
        path = TEXT if "prompt" in question else CHAT
        try:
            answer = await runner.ask(candidate, path, fields, payer)
            other = request.answer if against is None else await runner.ask(against, path, fields, payer)
        except Refused as why:
            refused[str(why)] += 1
            continue
        grades: tuple[float, float] | None = None
        if judge is not None:
            graded = [
                (await runner.grade(judge, candidate.tenant, asked(fields), text, payer)).value
                for text in (other, answer)
            ]
            theirs, own = graded
            if theirs is not None and own is not None:
                grades = (theirs, own)
        alike = await asyncio.to_thread(_agreement, other, answer)
        replayed.append(Replayed(request, other, answer, alike, grades))
    return replayed, refused


def report(replayed: Sequence[Replayed], refused: Counter[str], examples: int) -> dict[str, Any]:
    """Means over the requests, and those where the two differ most, side by side."""
    differing = sorted(replayed, key=lambda one: (one.agreement.edit, one.request.id))[:examples]
    return {
        "requests": len(replayed),
        "refused": dict(refused.most_common(5)),
        "answered_by": dict(Counter(one.request.version for one in replayed).most_common()),
        "agreement": {name: _mean([getattr(one.agreement, name) for one in replayed]) for name in Agreement.__slots__},
        "refusals": {
            "other": _mean([float(refuses(one.other)) for one in replayed]),
            "candidate": _mean([float(refuses(one.answer)) for one in replayed]),
        },
        "judge": {
            "requests": sum(one.grades is not None for one in replayed),
            "other": _mean([one.grades[0] for one in replayed if one.grades]),
            "candidate": _mean([one.grades[1] for one in replayed if one.grades]),
        },
        "ratings": _ratings(replayed),
        "examples": [
            {
                "request_id": one.request.id,
                "version": one.request.version,
                "edit": round(one.agreement.edit, 4),
                "asked": _last(one.request)[-SHOWN:],
                "other": one.other[:SHOWN],
                "candidate": one.answer[:SHOWN],
                "correction": (one.request.correction or "")[:SHOWN] or None,
                "rating": one.kept_rating,
            }
            for one in differing
        ],
    }


def _ratings(replayed: Sequence[Replayed]) -> dict[str, Any]:
    """The candidate's mean rating on requests that were rated, off-policy: known where it gave an answer that somebody
    judged, and so between what it is if all of its other answers are bad, and if all are good."""
    rated = [one for one in replayed if one.kept_rating is not None]
    known = [one.rating for one in rated if one.rating is not None]
    low = None if not rated else round(sum(known) / len(rated), 4)
    high = None if not rated else round((sum(known) + len(rated) - len(known)) / len(rated), 4)
    kept = _mean([one.kept_rating for one in rated if one.kept_rating is not None])
    return {"rated": len(rated), "given": kept, "known": len(known), "low": low, "high": high}


def _agreement(other: str, answer: str) -> Agreement:
    """Of two texts, by words."""
    numbers: dict[str, int] = {}
    first, second = ([numbers.setdefault(word, len(numbers)) for word in text.split()] for text in (other, answer))
    return agreement(first, second)


def _last(request: Captured) -> str:
    return request.asked if isinstance(request.asked, str) else request.asked[-1]["content"]


def _said_of(row: Captured) -> bool:
    return row.rating is not None or row.correction is not None


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
