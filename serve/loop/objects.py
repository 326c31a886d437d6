"""A loop, where it is, and its tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Where a loop is."""

    WAITING = "waiting"  # for something to open a try
    GATHERING = "gathering"  # examples of new traffic
    TRAINING = "training"  # a fine-tuning job
    GATE = "gate"  # the candidate is compared with the live version
    CANARY = "canary"  # the candidate answers a share of the traffic
    ASKING = "asking"  # for a person's yes


class Outcome(StrEnum):
    """What a try came to."""

    PROMOTED = "promoted"
    REJECTED = "rejected"  # by the gate, the canary or a person
    FAILED = "failed"  # there was no candidate


@dataclass(frozen=True, slots=True)
class State:
    """How far a loop is. Times are seconds since 1970; `note` says in a sentence what it waits for."""

    since: float = 0.0
    look: float = 0.0  # nothing is to be done before
    not_before: float = 0.0  # no try is opened before
    failures: int = 0  # tries in a row that came to nothing
    trained_until: float = 0.0  # traffic before this was trained on
    traffic_since: float = 0.0  # of this try: when what moved began to
    number: int = 0  # of the try, and of the last one while none goes on
    tried: float | None = None  # when that try was opened
    alpha: float = 0.0
    live: int = 0
    job: str = ""
    candidate: int = 0
    has_share: bool = False  # the candidate was given its share of the traffic
    held_out: str = ""  # the id of the examples that the gate asks
    gathered_until: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop as the database has it; `name` is the adapter's full name, `wish` what somebody asked of it."""

    id: str
    name: str
    phase: Phase
    state: State
    wish: Mapping[str, Any] | None = None
    stopped: str | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """One attempt at a next version: `content` has what opened it, and its evidence step by step."""

    loop: str
    number: int
    began: float
    alpha: float
    ended: float | None = None
    outcome: str | None = None
    content: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        return {
            "try": self.number,
            "began": self.began,
            "ended": self.ended,
            "outcome": self.outcome,
            "alpha": self.alpha,
            **self.content,
        }


@dataclass(frozen=True, slots=True)
class Reference:
    """Held-out examples of an adapter; without a label those of a try that goes on. `score`: of the version that
    became live with them."""

    id: str
    number: int
    made: float
    examples: int
    label: str | None = None
    score: float | None = None

    def described(self) -> dict[str, Any]:
        return {"id": self.id, "label": self.label, "made": self.made, "examples": self.examples, "score": self.score}
