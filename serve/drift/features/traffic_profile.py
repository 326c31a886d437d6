"""What a version is asked, in terms that people use: language, length, tenant and topics of its requests.

    profile = TrafficProfile()
    profile.add(Prompt(tokens=120, language="de", tenant="acme", words=..., asker=7, vector=...))
    profile.languages(profile.last(100)), profile.topics

Two of them, of the reference and of recent requests, say what moved (`serve.drift.change_description`). Kept are
numbers and counts of words (`serve.drift.features.word_counts`), neither texts nor tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.word_counts import WordCounts

Value = TypeVar("Value", int, str)

# Requests that are remembered one by one, in four values each.
REMEMBERED = 512
# Centres of what was asked before, and of what is asked now.
REFERENCE_TOPICS, RECENT_TOPICS = 6, 3
# Half-life of recent topics, in requests.
HALF_LIFE = 64.0


class Prompt(NamedTuple):
    """One request. words: by their hashes, empty where they may not be counted; vector: (dimensions,). marks: how it is
    written (`serve.models.text_marks`)."""

    tokens: int
    language: str
    tenant: str
    words: Mapping[int, str]
    asker: int
    vector: NDArray[np.floating]
    marks: tuple[str, ...] = ()


class Seen(NamedTuple):
    """What is remembered of one request. topic: its number."""

    tokens: int
    language: str
    tenant: str
    topic: int
    marks: Sequence[str] = ()


@dataclass(slots=True, eq=False)
class TrafficProfile:
    """most_topics: groups of prompts that are alike; half_life: of their requests, 0 for never.

    topics: the words of each group; centres: (topics, dimensions), where each lies.
    """

    most_topics: int = REFERENCE_TOPICS
    half_life: float = 0.0
    topics: list[WordCounts] = field(default_factory=list)
    centres: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @classmethod
    def of_recent(cls) -> Self:
        """Of the latest requests: older ones count for less and less."""
        return cls(RECENT_TOPICS, HALF_LIFE)

    def add(self, prompt: Prompt) -> None:
        """Take in one request: into the topic whose centre lies nearest, which moves towards it."""
        if len(self.topics) < self.most_topics:
            number = len(self.topics)
            self.topics.append(WordCounts(self.half_life))
            self.centres = np.vstack((*self.centres, prompt.vector)).astype(np.float64)
        else:
            number = self.nearest(prompt.vector)
        words = self.topics[number]
        words.add(prompt.words, prompt.asker)
        centre = self.centres[number]
        centre += (prompt.vector - centre) / words.requests
        self.seen.append(Seen(prompt.tokens, prompt.language, prompt.tenant, number, prompt.marks))

    def nearest(self, vector: NDArray[np.floating]) -> int:
        """The number of the topic whose centre lies nearest."""
        away = self.centres - vector
        away *= away
        return int(np.add.reduce(away, axis=1).argmin())

    def last(self, count: int) -> list[Seen]:
        """The latest `count` requests, or as many as are remembered."""
        return list(self.seen)[max(0, len(self.seen) - count) :]

    def accepted(self, count: int) -> TrafficProfile:
        """A reference that begins with the latest `count` requests and the topics here."""
        made = TrafficProfile(len(self.topics) or REFERENCE_TOPICS)
        made.topics = [words.unfading() for words in self.topics]
        made.centres = self.centres.copy()
        made.seen.extend(self.last(count))
        return made

    def state(self) -> dict[str, Any]:
        """For JSON."""
        topics = [
            {"centre": centre.tolist(), **words.state()}
            for centre, words in zip(self.centres, self.topics, strict=True)
        ]
        return {"most": self.most_topics, "half_life": self.half_life, "topics": topics, "seen": list(self.seen)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        self = cls(int(state["most"]), float(state["half_life"]))
        self.topics = [WordCounts.from_state(topic) for topic in state["topics"]]
        if self.topics:
            self.centres = np.array([topic["centre"] for topic in state["topics"]], np.float64)
        self.seen.extend(Seen(*request) for request in state["seen"])
        return self


@dataclass(slots=True, eq=False)
class TrafficProfiles:
    """Of the reference of one signal, and of its recent requests."""

    reference: TrafficProfile = field(default_factory=TrafficProfile)
    recent: TrafficProfile = field(default_factory=TrafficProfile.of_recent)

    def inherit(self, other: TrafficProfiles) -> None:
        """The reference is a copy of the `other`'s."""
        self.reference = TrafficProfile.from_state(other.reference.state())

    def accept(self, count: int) -> None:
        """The latest `count` requests are the reference from now on."""
        self.reference, self.recent = self.recent.accepted(count), TrafficProfile.of_recent()

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"reference": self.reference.state(), "recent": self.recent.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(TrafficProfile.from_state(state["reference"]), TrafficProfile.from_state(state["recent"]))


def typical_tokens(requests: Sequence[Seen]) -> int | None:
    """The geometric mean of the prompts' lengths, that moves where a third of them does; None of nothing."""
    return round(np.expm1(np.log1p([request.tokens for request in requests]).mean())) if requests else None


def mark_shares(requests: Sequence[Seen]) -> dict[str, float]:
    """Of all requests those that are written in a way that stands out."""
    counts = Counter(mark for request in requests for mark in request.marks)
    return {mark: round(count / len(requests), 3) for mark, count in counts.most_common()}


def shares_of(values: Iterable[Value]) -> dict[Value, float]:
    """Of each value, the most frequent first."""
    counts = Counter(values)
    return {value: round(count / counts.total(), 3) for value, count in counts.most_common()}
