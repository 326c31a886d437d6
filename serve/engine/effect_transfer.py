"""Whether an adapter does on another base what it did on the one that it was approved on.

Its effect is what it moves: the log-probabilities of the base's likeliest next tokens on the probe's prompts. On
another base (a quantized export, a pruned one) the same adapter moves them differently; by how much, as a part of what
it moved before, is what is lost. 0 is the very same effect, 1 is as far off as no effect at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.engine.effect_probe import PROMPTS, Logprobs, measuring
from serve.engine.engine import Engine


class Subject(Protocol):
    """An adapter, as far as it is measured."""

    @property
    def id(self) -> str: ...
    @property
    def tag(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """One adapter on two bases; effects in nats. `problem` is empty if it may go over."""

    adapter: str
    before: float = 0.0
    after: float = 0.0
    lost: float = 0.0
    problem: str = ""

    def described(self) -> dict[str, Any]:
        return asdict(self)


class Effects:
    """What a base says on the prompts, and what it says with an adapter."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._base: Sequence[Logprobs] | None = None

    async def of(self, subject: Subject, path: Path) -> Sequence[Logprobs]:
        """By how much each of the base's likeliest tokens is moved, for every prompt."""
        if self._base is None:
            async with measuring(self._engine) as backend:
                self._base = await backend.probe(None, PROMPTS)
        async with measuring(self._engine, subject.id, path) as backend:
            answers = await backend.probe(subject.id, PROMPTS)
        return [moved(base, other) for base, other in zip(self._base, answers, strict=True)]


def moved(base: Logprobs, other: Logprobs) -> Logprobs:
    """Token -> log-probability with the adapter less that without; who is not listed counts as the last who is."""
    floor = min(other.values())
    return {token: other.get(token, floor) - value for token, value in base.items()}


def compared(adapter: str, before: Sequence[Logprobs], after: Sequence[Logprobs], tolerance: float) -> Transfer:
    """The two effects of an adapter compared."""
    effect_before = 0.0
    effect_after = 0.0
    difference = 0.0
    count = 0
    for old, new in zip(before, after, strict=True):
        for token in old.keys() & new.keys():
            effect_before += abs(old[token])
            effect_after += abs(new[token])
            difference += abs(new[token] - old[token])
            count += 1
    if not count:
        return Transfer(adapter, problem="" if not before else "nothing to compare: the bases share no likely token")
    if not effect_before:  # it was loaded before its training: there is nothing to lose
        return Transfer(adapter, after=round(effect_after / count, 4))
    lost = difference / effect_before
    problem = "" if lost <= tolerance else f"{lost:.2f} of its effect is lost or changed, and {tolerance:g} is allowed"
    return Transfer(adapter, round(effect_before / count, 4), round(effect_after / count, 4), round(lost, 4), problem)
