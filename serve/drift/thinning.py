"""Which requests a detector may see: its guarantee needs them exchangeable, and repeats are not.

    thinning = Thinning(interval=600, block=8, seed=7)
    if thinning.accepts(tokens=prompt_tokens, key=conversation_or_key, now=seconds):
        for row in thinning.shuffled(row):
            signal.update(row)

A prompt that was seen before, or nearly (MinHash over three-token runs, Broder 1997), is left out; so is a second
request of one conversation or key within `interval` seconds. What is left is given out in shuffled blocks, so that
what came close together carries no order. The reference must have gone through the same. Memory is bounded: the oldest
are forgotten. Of a prompt only hashes are kept, neither its tokens nor its text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Item = TypeVar("Item")

ACCEPTED, REPEATED, NEAR, CROWDED = COUNTS = ("accepted", "repeated", "near_duplicate", "same_conversation")
RUN = 3
# 4 bands of 3 minima: 94 of 100 prompts that share 80 % of their runs are found, 3 of 100 that share 20 %.
BANDS, MINIMA = 4, 3
_MIX = np.uint64(0x9E3779B97F4A7C15)
_TURNS = np.random.Generator(np.random.PCG64(1997)).integers(1, 1 << 63, BANDS * MINIMA, np.uint64) * 2 + 1


class Thinning(Generic[Item]):
    """interval: seconds between two requests of one key (0: no limit). block: accepted requests shuffled together.

    memory: prompts and keys that are remembered. ignore: runs that prompts share by template or system prompt, which
    would make all of them near-duplicates (`common_runs`).
    """

    def __init__(
        self,
        *,
        interval: float = 600.0,
        block: int = 8,
        memory: int = 20_000,
        ignore: NDArray[np.uint64] | None = None,
        seed: int = 0,
    ) -> None:
        if block < 1 or memory < 1 or interval < 0:
            raise ValueError(f"interval {interval}, block {block}, memory {memory}: at least 0, 1 and 1 are taken")
        self.counts = dict.fromkeys(COUNTS, 0)
        self._interval, self._block, self._memory = interval, block, memory
        self._ignore = None if ignore is None or not len(ignore) else np.unique(ignore)
        self._prompts: OrderedDict[bytes, None] = OrderedDict()
        self._bands: OrderedDict[bytes, None] = OrderedDict()
        self._last: OrderedDict[Hashable, float] = OrderedDict()
        self._waiting: list[Item] = []
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def accepts(self, *, tokens: ArrayLike, now: float, key: Hashable | None = None) -> bool:
        """Whether a request with this prompt may be seen; it is remembered either way."""
        reason = self._reason(np.ascontiguousarray(tokens, np.int64), now, key)
        self.counts[reason] += 1
        return reason == ACCEPTED

    def shuffled(self, item: Item) -> list[Item]:
        """Keep an accepted item until its block is full; the whole block, shuffled, when this one filled it."""
        self._waiting.append(item)
        return self.flush() if len(self._waiting) >= self._block else []

    def offer(self, item: Item, *, tokens: ArrayLike, now: float, key: Hashable | None = None) -> list[Item]:
        """Both in one: a shuffled block when this item was accepted and filled it, else nothing."""
        return self.shuffled(item) if self.accepts(tokens=tokens, now=now, key=key) else []

    def flush(self) -> list[Item]:
        """The items that wait for their block to fill, shuffled."""
        block, self._waiting = self._waiting, []
        return [block[i] for i in self._rng.permutation(len(block))]

    def _reason(self, ids: NDArray[np.int64], now: float, key: Hashable | None) -> str:
        # All of it is learned from every request, also from one that is left out: a chain of near-duplicates stays out.
        repeated = _remember(self._prompts, _digest(ids.tobytes()), self._memory)
        near = False
        if not repeated:
            for band in self._signature(ids):
                near = _remember(self._bands, band, self._memory * BANDS) or near
        crowded = False
        if key is not None and self._interval > 0:
            last = self._last.get(key)
            crowded = last is not None and now - last < self._interval
            if not (repeated or near or crowded):
                self._last[key] = now
                self._last.move_to_end(key)
                if len(self._last) > self._memory:
                    self._last.popitem(last=False)
        return REPEATED if repeated else NEAR if near else CROWDED if crowded else ACCEPTED

    def _signature(self, ids: NDArray[np.int64]) -> list[bytes]:
        runs = _runs(ids)
        if self._ignore is not None:
            places = np.minimum(self._ignore.searchsorted(runs), len(self._ignore) - 1)
            runs = runs[self._ignore[places] != runs]
        if not len(runs):
            return []
        minima = _hashes(runs).min(axis=1)
        bands = minima.reshape(BANDS, MINIMA)
        return [_digest(bytes([i]) + band.tobytes()) for i, band in enumerate(bands)]


def common_runs(prompts: Iterable[ArrayLike], share: float = 0.1) -> NDArray[np.uint64]:
    """Runs of tokens that more than `share` of the prompts contain: the template's and the system prompt's."""
    each = [np.unique(_runs(np.ascontiguousarray(tokens, np.int64))) for tokens in prompts]
    if not each:
        return np.zeros(0, np.uint64)
    runs, counts = np.unique(np.concatenate(each), return_counts=True)
    return runs[counts > max(1.0, share * len(each))]


def _runs(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Every run of RUN tokens as one number; a shorter prompt is one run."""
    words = ids.astype(np.uint64)
    if len(words) < RUN:
        return np.array([hash(ids.tobytes()) & ((1 << 64) - 1)], np.uint64) if len(words) else words
    run = words[: len(words) - RUN + 1].copy()
    for i in range(1, RUN):
        run = (run ^ (run >> np.uint64(29))) * _MIX + words[i : len(words) - RUN + 1 + i]
    return run


def _hashes(runs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(minima, runs): one order of all runs a row."""
    mixed = runs ^ (runs >> np.uint64(31))
    return (mixed * _TURNS[:, None]) >> np.uint64(16)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _remember(seen: OrderedDict[bytes, None], digest: bytes, at_most: int) -> bool:
    """Whether it was known; it is now, as the newest."""
    known = digest in seen
    seen[digest] = None
    seen.move_to_end(digest)
    if len(seen) > at_most:
        seen.popitem(last=False)
    return known
