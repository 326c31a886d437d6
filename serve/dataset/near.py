"""Texts that are nearly alike: bottom-k sketches of their five-byte shingles (Broder 1997; Cohen and Kaplan 2007).

    sketches = [sketch(text) for text in texts]
    common = common_shingles(sketches)
    index = NearIndex(common)
    index.add(sketches[0])
    index.near(sketches[1])                  # the numbers of those that are nearly alike

Case, punctuation and spaces count for nothing. Shingles that many of the texts share, as a template's, are no part of
what is compared: else all requests of one template were alike. Texts without anything else are alike only when equal.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

WIDTH, SIZE = 5, 128
# The Jaccard similarity from which two texts are nearly alike.
ALIKE = 0.7
# Shingles in so large a part of at least so many texts are common.
COMMON, FEWEST = 0.1, 30
# Pairs of neighbours among the smallest shingles: two texts that are alike share one of them.
KEYS = 16
# A text is compared with so many others at most: those with the most and the rarest keys in common with it. All that is
# written after one template shares the template's keys.
NEIGHBOURS = 300
# With fewer shingles of its own a text is compared as a whole.
FEWEST_SHINGLES = 3

_APART = re.compile(r"\W+")
_WHOLE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

Shingles: TypeAlias = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """The smallest hashes of a text's shingles: all of them up to `bound`; `exact` is the digest of the text."""

    exact: bytes
    shingles: Shingles
    bound: np.uint64

    def without(self, common: Shingles) -> Sketch:
        """As if the text had none of these."""
        return Sketch(self.exact, np.setdiff1d(self.shingles, common, assume_unique=True), self.bound)


def sketch(text: str) -> Sketch:
    plain = bared(text).encode("utf-8", "replace")
    codes = np.frombuffer(plain, np.uint8).astype(np.uint64)
    runs = max(0, len(codes) - WIDTH + 1)
    packed = np.zeros(runs, np.uint64)
    for place in range(WIDTH):
        packed |= codes[place : place + runs] << np.uint64(8 * place)
    hashes = np.unique(_mixed(packed))
    bound = hashes[SIZE - 1] if len(hashes) > SIZE else _WHOLE
    return Sketch(exact(text), hashes[:SIZE], bound)


def bared(text: str) -> str:
    """The text in lower case, its words with one space between them."""
    return _APART.sub(" ", text.casefold()).strip()


def exact(text: str) -> bytes:
    """The same for texts that differ in case, punctuation and spaces only."""
    plain = bared(text) or text.strip()  # of signs alone
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()


def common_shingles(sketches: Sequence[Sketch]) -> Shingles:
    """Those that many of the texts share."""
    if len(sketches) < FEWEST:
        return np.empty(0, np.uint64)
    shingles, counts = np.unique(np.concatenate([one.shingles for one in sketches]), return_counts=True)
    return shingles[counts > COMMON * len(sketches)]


def similarities(one: Sketch, others: Sequence[Sketch]) -> NDArray[np.float64]:
    """The Jaccard similarity of the text's shingles to those of each, as far as sketches go; 1 for equal texts."""
    if not others or not len(one.shingles):
        return np.array([float(one.exact == other.exact) for other in others])
    bounds = np.minimum(np.array([other.bound for other in others], np.uint64), one.bound)
    lengths = [len(other.shingles) for other in others]
    theirs = np.concatenate([other.shingles for other in others])
    owner = np.repeat(np.arange(len(others)), lengths)
    within = theirs <= bounds[owner]
    places = np.minimum(np.searchsorted(one.shingles, theirs), len(one.shingles) - 1)
    shared = np.bincount(owner[within & (one.shingles[places] == theirs)], minlength=len(others))
    first = np.searchsorted(one.shingles, bounds, side="right")
    second = np.bincount(owner[within], minlength=len(others))
    found = np.where(np.minimum(first, second) < FEWEST_SHINGLES, 0.0, shared / np.maximum(1, first + second - shared))
    return np.where([other.exact == one.exact for other in others], 1.0, found)


class NearIndex:
    """Finds, among the sketches that were added, those whose texts are nearly that of another: by number, from 0."""

    def __init__(self, common: Shingles, sketches: Iterable[Sketch] = ()) -> None:
        self._common = common
        self._sketches: list[Sketch] = []
        self._exact: dict[bytes, int] = {}
        self._keys: dict[tuple[int, int], array[int]] = {}
        for one in sketches:
            self.add(one)

    def add(self, one: Sketch) -> None:
        own, number = one.without(self._common), len(self._sketches)
        self._sketches.append(own)
        self._exact.setdefault(own.exact, number)
        for key in _keys(own):
            self._keys.setdefault(key, array("q")).append(number)

    def near(self, one: Sketch) -> list[int]:
        """Those of its neighbours that are nearly alike, the first ones first; an equal one too."""
        own = one.without(self._common)
        found = self._neighbours(own)
        how = similarities(own, [self._sketches[number] for number in found])
        alike = {number for number, value in zip(found, how.tolist(), strict=True) if value >= ALIKE}
        equal = self._exact.get(own.exact)
        return sorted(alike if equal is None else alike | {equal})

    def _neighbours(self, own: Sketch) -> list[int]:
        lists = [np.frombuffer(there, np.int64) for key in _keys(own) if (there := self._keys.get(key))]
        if not lists:
            return []
        rarity = np.repeat([1 / len(there) for there in lists], [len(there) for there in lists])
        shared = np.bincount(np.concatenate(lists), rarity)
        found = np.flatnonzero(shared)
        if len(found) > NEIGHBOURS:
            found = found[np.argsort(-shared[found], kind="stable")[:NEIGHBOURS]]
        return [int(number) for number in found]


def _keys(one: Sketch) -> list[tuple[int, int]]:
    smallest = one.shingles[: KEYS + 1].tolist()
    return list(pairwise(smallest))


def _mixed(values: Shingles) -> Shingles:
    """Spread over all 64 bits, as splitmix64's last step does."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
