"""Which requests a detector may see: its guarantee needs them exchangeable, and repeats are not.

    thinning = Thinning(interval=600)
    taken = thinning.offer(item, tokens=prompt_tokens, key=conversation_or_key, now=seconds)
    if taken is not None:                           # a request some places before, which may be seen
        taken.item, taken.own                       # its own tokens, those that prompts do not share

Left out is a prompt that came within the last `window` requests already, or nearly (MinHash over three-token runs,
Broder 1997; numbers count as equal), or that is nothing but what recent prompts share; and a second request of one
conversation or key within `window` requests or `interval` seconds. All requests are counted for the window, those left
out too, so that what is accepted depends on a fixed span of the stream: were repeats dropped for ever, popular prompts
would come first and rare ones later, and that would be a drift that the sampling makes itself. Until the first window
is full nothing is accepted. It says how often two requests that have nothing to do with each other are nearly the same,
as those of a narrow task are: the more, the fewer requests one is held against, or most of them would be left out.

What recent prompts begin or end with alike (`features.shared_ends`) is no part of what is compared; a few requests
ahead help to know it. Memory is bounded, and is passed on as arrays. Of a prompt hashes are kept; its tokens only until
the few requests after it have come.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features.shared_ends import AHEAD, MINIMA, Own, Read, SharedEnds
from serve.drift.share_watch import OpeningWatch, ShareWatch
from serve.drift.state_arrays import below, prefixed

Item = TypeVar("Item")

ACCEPTED, *REASONS = COUNTS = ("accepted", "repeated", "near_duplicate", "same_conversation", "warming_up")
_, REPEATED, NEAR, CROWDED, WARMING_UP = COUNTS
# Raw requests after which a prompt, or nearly it, may be seen again.
WINDOW = 64
# Of unrelated requests about so many are left out as nearly the same; what comes in a burst is within NEAREST.
LEFT_OUT, NEAREST = 0.15, 8
# Raw requests after which an asker may be seen again, though the interval is not over.
MOST_BETWEEN = 1000
# Where more of the requests come from askers within their interval, their rule has to come to its steady state too.
RETURNING = 0.05
# Bands of three minima: 94 of 100 prompts that share 80 % of their runs are found, 3 of 100 that share 20 %.
BANDS = MINIMA // 3
# The share of requests that is accepted, over so many raw ones, is an alarm below a third of what it was.
SAMPLING_WINDOW, SAMPLING_FALL = 512, 1 / 3


class _Window:
    """Which digests came with the last `window` requests, and with which of them last."""

    def __init__(self, window: int) -> None:
        self.window = window
        # In the order in which they came last, and what each request brought.
        self._last: dict[bytes, int] = {}
        self._came: deque[tuple[int, Sequence[bytes]]] = deque()

    def __len__(self) -> int:
        return len(self._last)

    def came(self, digests: Sequence[bytes], raw: int) -> bool:
        """Whether any of them came within the window; all are remembered as those of the request `raw`."""
        last, came = self._last, self._came
        while came and came[0][0] < raw - self.window:
            then, gone = came.popleft()
            for digest in gone:
                if last.get(digest) == then:
                    del last[digest]
        known = False
        for digest in digests:
            known |= last.pop(digest, None) is not None
            last[digest] = raw
        came.append((raw, digests))
        return known

    def shorten(self) -> None:
        """Where requests half a window apart have digests in common, so that about LEFT_OUT of such would be known."""
        came = defaultdict[int, set[bytes]](set)
        for raw, digests in self._came:
            came[raw].update(digests)
        pairs = [(a, b) for (i, a), (j, b) in combinations(came.items(), 2) if j - i >= self.window // 2]
        alike = sum(not a.isdisjoint(b) for a, b in pairs)
        if alike:
            self.window = min(max(int(LEFT_OUT * len(pairs) / alike), NEAREST), self.window)

    def state(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """(n, 16) the digests, and the request of each."""
        digests = np.frombuffer(b"".join(self._last), np.uint8).reshape(-1, _DIGEST).copy()
        return digests, np.array(list(self._last.values()), np.int64)

    def restore(self, digests: NDArray[np.uint8], raws: NDArray[np.int64]) -> None:
        for digest, raw in zip(digests, raws.tolist(), strict=True):
            self.came((bytes(digest),), raw)


class _Waiting(NamedTuple, Generic[Item]):
    """A request whose followers are not all there yet. opening: as `offer` takes it."""

    item: Item
    read: Read
    digest: bytes
    key: int | None
    now: float
    opening: NDArray[np.uint64] | None


class Taken(NamedTuple, Generic[Item]):
    """An accepted request: its prompt's tokens, and those of them that it does not share with others."""

    item: Item
    own: NDArray[np.int32]
    tokens: NDArray[np.int32]


class Thinning(Generic[Item]):
    """interval: seconds between two requests of one key (0: no limit). window, warm_up: in raw requests.

    numbers: which tokens are made of digits (`Embedding.numbers`).
    """

    def __init__(
        self,
        *,
        interval: float = 600.0,
        window: int = WINDOW,
        warm_up: int = 0,
        ahead: int = AHEAD,
        numbers: NDArray[np.bool_] | None = None,
    ) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        # Why the last requests were left out, those that the share of the accepted is about.
        self._lately: deque[str] = deque(maxlen=SAMPLING_WINDOW)
        self.acceptance = ShareWatch(needed=SAMPLING_WINDOW, window=SAMPLING_WINDOW, fall=SAMPLING_FALL)
        self.opening = OpeningWatch()
        self._interval = interval
        self._window = window
        self._warm_up = warm_up
        self._ahead = ahead
        self.shared = SharedEnds(numbers)
        self._waiting: deque[_Waiting[Item]] = deque()
        self._raw = 0
        self._prompts, self._bands = _Window(window), _Window(window)
        # When each was last accepted, in raw requests and seconds; the oldest first.
        self._askers: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._began: float | None = None
        self._steady = warm_up == 0
        # Requests from askers within their interval, whatever they were left out for.
        self._returned = 0

    def offer(
        self,
        item: Item,
        *,
        tokens: ArrayLike,
        now: float,
        key: int | None = None,
        opening: NDArray[np.uint64] | None = None,
    ) -> Taken[Item] | None:
        """Take in a request. Returns the one that came `ahead` requests before, if it is accepted. opening: the runs of
        what stands before `tokens`, where that is known; else it is what the tokens share with those around them."""
        ids = np.array(tokens, np.int64)
        self._waiting.append(_Waiting(item, self.shared.read(ids), _digest(ids.tobytes()), key, now, opening))
        return self._decide(self._waiting.popleft()) if len(self._waiting) > self._ahead else None

    def flush(self) -> list[Taken[Item]]:
        """Decide on those that wait, though nothing follows them."""
        decided = [self._decide(self._waiting.popleft()) for _ in range(len(self._waiting))]
        return [taken for taken in decided if taken is not None]

    def _decide(self, request: _Waiting[Item]) -> Taken[Item] | None:
        own = self.shared.split(request.read)
        reason = self._reason(request, own)
        if not self._steady:
            self._steady = self._is_steady(request.now)
            if self._steady:
                self._bands.shorten()
            reason = WARMING_UP if reason == ACCEPTED else reason
        else:
            self._lately.append(reason)
            self.acceptance.update(reason == ACCEPTED, request.now)
        self.counts[reason] += 1
        if reason != ACCEPTED:
            return None
        named = request.opening is not None
        self.opening.update(own.shared_runs if request.opening is None else request.opening, request.now, named=named)
        return Taken(request.item, own.tokens, request.read.words.tokens)

    def _reason(self, request: _Waiting[Item], own: Own) -> str:
        # All of it is learned from every request, also from one that is left out: a chain of near-duplicates stays out.
        self._raw += 1
        repeated, near = self._prompts.came((request.digest,), self._raw), False
        if not repeated:
            near = self._bands.came(_bands(own.minima), self._raw) or not (own.whole or own.words)
        crowded = request.key is not None and self._crowded(request.key, request.now)
        self._returned += crowded
        if not (repeated or near or crowded) and request.key is not None:
            self._askers[request.key] = self._raw, request.now
            self._askers.move_to_end(request.key)
        return REPEATED if repeated else NEAR if near else CROWDED if crowded else ACCEPTED

    def _crowded(self, key: int, now: float) -> bool:
        """Whether this asker's last accepted request is too close."""
        longest = max(self._window, MOST_BETWEEN)
        while self._askers and next(iter(self._askers.values()))[0] < self._raw - longest:
            self._askers.popitem(last=False)
        if self._interval <= 0 or key not in self._askers:
            return False
        raw, then = self._askers[key]
        return self._raw - raw <= self._window or now - then < self._interval

    def _is_steady(self, now: float) -> bool:
        """Whether what is accepted no longer depends on where the stream began."""
        self._began = now if self._began is None else self._began
        if self._raw < self._warm_up:
            return False
        passed = now - self._began
        if passed >= self._interval or self._raw >= MOST_BETWEEN:
            return True
        # Of n requests about n squared over 2 pairs have one asker as likely as any; later each request makes a pair
        # with all those within the interval.
        within = min(MOST_BETWEEN, self._raw * self._interval / passed) if passed > 0 else MOST_BETWEEN
        return 2 * within * self._returned <= RETURNING * self._raw**2

    @property
    def left_out(self) -> str:
        """Why most of the requests that were left out lately were; empty before any (after a restart too)."""
        reasons = Counter(reason for reason in self._lately if reason != ACCEPTED)
        return reasons.most_common(1)[0][0] if reasons else ""

    def acknowledge(self) -> None:
        """The alarms about the sampling itself have been dealt with."""
        self.acceptance.acknowledge()
        self.opening.acknowledge()

    def state(self) -> dict[str, NDArray]:
        """What is remembered, as arrays; not the requests that wait."""
        state = {}
        for name, window in (("prompts", self._prompts), ("bands", self._bands)):
            state[name], state[f"{name}.raw"] = window.state()
        state["askers"] = np.array(list(self._askers), np.uint64)
        state["askers.raw"] = np.array([raw for raw, _ in self._askers.values()], np.int64)
        state["askers.seconds"] = np.array([seconds for _, seconds in self._askers.values()], np.float64)
        state["raw"] = np.array([self._raw, self._steady, self._returned, self._bands.window])
        state["shared.openings"] = np.array(self.shared.openings, np.int64).reshape(-1, 2)
        state["shared.endings"] = np.array(self.shared.endings, np.int64).reshape(-1, 2)
        state |= prefixed(self.acceptance.state(), "acceptance.")
        state |= prefixed(self.opening.state(), "opening.")
        state["counts"] = np.array([self.counts[name] for name in COUNTS])
        return state

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where the thinning was whose `state()` this is, or what an heir takes over of it (`inherited`)."""
        numbers = state["raw"].tolist()
        # Earlier releases did not count who came back, and had one window for all.
        self._raw, steady, self._returned, near = numbers + [0, self._window][len(numbers) - 2 :]
        self._steady = bool(steady)
        self._bands = _Window(near)
        for name, window in (("prompts", self._prompts), ("bands", self._bands)):
            window.restore(state[name], state[f"{name}.raw"])
        seen = zip(state["askers.raw"].tolist(), state["askers.seconds"].tolist(), strict=True)
        self._askers.update(zip(state["askers"].tolist(), seen, strict=True))
        if "shared.openings" in state:  # earlier releases wrote neither
            self.shared.know(_pairs(state["shared.openings"]), _pairs(state["shared.endings"]))
        self.acceptance.restore(below(state, "acceptance."))
        self.opening.restore(below(state, "opening."))
        if "counts" in state:
            self.counts = dict(zip(COUNTS, state["counts"].tolist(), strict=True))


def inherited(state: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """What an adapter's next version takes over of a thinning's `state()`: what it remembers, neither what it counted
    nor its alarms."""
    if not state:
        return {}
    heir: Thinning[None] = Thinning()
    heir.restore(state)
    heir.acknowledge()
    return {name: value for name, value in heir.state().items() if name != "counts" and not name.endswith(".alarms")}


def _pairs(array: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    return tuple((length, hash) for length, hash in array.tolist())


def _bands(minima: NDArray[np.uint64]) -> list[bytes]:
    """The digests of a prompt's bands; none of one without symbols."""
    data = minima.tobytes()
    size = len(data) // BANDS
    return [_digest(bytes([i]) + data[i * size : (i + 1) * size]) for i in range(BANDS)] if data else []


_DIGEST = 16


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
