"""Which version answers a request while a name's traffic is split: the same asker always gets the same version.

An asker is a point in [0, 1), and points below the weight go to the candidate. A growing weight only adds askers to it
and never takes one away.

Few askers who ask much would make another share of that than the weight, and are only a few draws of luck. So while
most requests come from askers who asked before, requests are dealt instead: each that begins a conversation gets a
version by lot, and the conversation keeps it. Lots are drawn in random blocks (blocks of random length, each with its
part of the candidate's at random places), so that shares come out exact.

A lot is known to the server that drew it alone. Where several servers answer, a conversation's version comes from its
hash in place of a lot: every server says the same of it, and shares come out as exact as conversations are many.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from serve.rollout.canary.askers import Asker

# Few askers: less than one in so many of the requests that began a conversation lately; and when they are many again.
FEW, MANY = 4, 2
# How many requests "lately" is.
RECENT = 500
# Conversations whose lot is remembered, and candidates.
CONVERSATIONS, CANDIDATES = 20_000, 1_000
# The length of a block, as a multiple of what it takes to have one request of the rarer version in it, and at most.
BLOCK, LONGEST_BLOCK = (0.75, 1.5), 1_000


@dataclass(frozen=True, slots=True)
class Draw:
    """Whether the candidate answers, and what names the draw: requests with the same name share their luck.

    None names no draw: each such request has one of its own.
    """

    taken: bool
    name: bytes | None


def point(name: str, version: int, key: bytes) -> float:
    """An asker's point in [0, 1) for this candidate; for another candidate it is another point."""
    digest = hashlib.blake2b(f"{name}@v{version}\0".encode() + key, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class Shares:
    """Deals requests out: by asker, or by lot where the asker is unknown or askers are few. For one event loop.

    With `shared`, other servers deal requests of the same conversations.
    """

    def __init__(self, seed: int = 0, *, shared: bool = False) -> None:
        self._seed = seed
        self._shared = shared
        self._splits: OrderedDict[tuple[str, int, str], _Split] = OrderedDict()

    def takes(self, name: str, version: int, weight: float, key: bytes | None, kind: str = "canary") -> bool:
        """Whether a request that `key` asked belongs to the share of `version`."""
        return self.deal(name, version, weight, Asker(key, key), kind).taken

    def deal(self, name: str, version: int, weight: float, asker: Asker, kind: str = "canary") -> Draw:
        """Which version answers this request; `version` with the probability `weight`."""
        split = self._splits.get((name, version, kind))
        if split is None:
            split = self._splits[name, version, kind] = _Split(
                name, version, f"{self._seed}/{kind}", shared=self._shared
            )
        self._splits.move_to_end((name, version, kind))
        if len(self._splits) > CANDIDATES:
            self._splits.popitem(last=False)
        return split.deal(weight, asker)


class _Split:
    """The traffic of one name, split with one candidate."""

    def __init__(self, name: str, version: int, seed: str, *, shared: bool) -> None:
        self._name, self._version = name, version
        self._shared = shared
        self._lots = _Lots(random.Random(f"{seed}/{name}@v{version}"))
        self._recent: deque[bytes] = deque()
        self._count: Counter[bytes] = Counter()
        self._few = False
        self._drawn: OrderedDict[bytes, Draw] = OrderedDict()

    def deal(self, weight: float, asker: Asker) -> Draw:
        if asker.key is None:
            return Draw(self._lots.draw(weight), None)
        if self._shared:
            key = asker.conversation or asker.key
            return Draw(point(self._name, self._version, key) < weight, key)
        if asker.begins:
            self._note(asker.key)
        drawn = None if asker.begins or asker.conversation is None else self._drawn.get(asker.conversation)
        if drawn is not None and 0 < weight < 1:
            return drawn
        if not self._few or not asker.begins:
            return Draw(point(self._name, self._version, asker.key) < weight, asker.key)
        draw = Draw(self._lots.draw(weight), os.urandom(16))
        if asker.conversation is not None:
            self._remember(asker.conversation, draw)
        return draw

    def _note(self, key: bytes) -> None:
        self._recent.append(key)
        self._count[key] += 1
        if len(self._recent) > RECENT:
            oldest = self._recent.popleft()
            self._count[oldest] -= 1
            if not self._count[oldest]:
                del self._count[oldest]
        self._few = len(self._count) * (MANY if self._few else FEW) < len(self._recent)

    def _remember(self, conversation: bytes, draw: Draw) -> None:
        self._drawn[conversation] = draw
        self._drawn.move_to_end(conversation)
        if len(self._drawn) > CONVERSATIONS:
            self._drawn.popitem(last=False)


class _Lots:
    """Random blocks: after any number of draws, those taken are within 3 of their part."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._weight = 0.0
        self._left: list[bool] = []
        # What the candidate has not been given yet of its part of the blocks so far.
        self._owed = 0.0

    def draw(self, weight: float) -> bool:
        if not 0 < weight < 1:
            return weight >= 1
        if weight != self._weight:
            self._weight = weight
            self._left = []
            self._owed = 0.0
        if not self._left:
            self._fill()
        return self._left.pop()

    def _fill(self) -> None:
        rare = min(self._weight, 1 - self._weight)
        length = min(max(round(self._rng.uniform(*BLOCK) / rare), 1), LONGEST_BLOCK)
        self._owed += length * self._weight
        whole = int(self._owed // 1)
        taken = min(max(whole + (self._rng.random() < self._owed - whole), 0), length)
        self._owed -= taken
        self._left = [True] * taken + [False] * (length - taken)
        self._rng.shuffle(self._left)
