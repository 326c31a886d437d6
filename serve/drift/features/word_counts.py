"""In how many requests each word was, and which words are typical of some requests among others.

Privacy: of a word that fewer than `ASKERS` different askers used only a hash is kept, in memory; such words are not
written to the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

# Different askers who used a word before it may be shown.
ASKERS = 5
# Words that are kept; as many again may come before the rarest are forgotten.
MOST = 250
# Letters, at least, of a word that says what a text is about, where words have spaces between them.
LETTERS = 4
# Standard deviations by which a typical word is more frequent.
TYPICAL = 3.0


@dataclass(slots=True)
class _Count:
    count: float = 0.0
    # What it had at most, when it was forgotten before.
    missed: float = 0.0
    askers: tuple[int, ...] = ()
    text: str = ""


class WordCounts:
    """half_life: in requests, after each so many of which all that came before counts half; 0 for never."""

    def __init__(self, half_life: float = 0.0) -> None:
        self._half_life = half_life
        self._until_half = half_life
        # How many requests were counted, the older ones for less.
        self.requests = 0.0
        # The largest count that was forgotten.
        self._forgotten = 0.0
        self._counts: dict[int, _Count] = {}

    def add(self, words: Mapping[int, str], asker: int) -> None:
        """Count one request: its words by their hashes (`hashed`), and a number for who asked."""
        self.requests += 1
        counts = self._counts
        for key, word in words.items():
            known = counts.get(key)
            if known is None:
                counts[key] = _Count(1.0, self._forgotten, (asker,))
                continue
            known.count += 1
            if not known.text and asker not in known.askers:
                known.askers = (*known.askers, asker)
                if len(known.askers) >= ASKERS:
                    known.text, known.askers = word, ()
        if len(self._counts) > 2 * MOST:
            self._forget()
        self._until_half -= 1
        if self._half_life and self._until_half <= 0:
            self._halve()

    def count_at_most(self, key: int) -> float:
        """Rare words are forgotten to make room: in how many requests the word was at most."""
        known = self._counts.get(key)
        return known.count + known.missed if known else self._forgotten

    def frequency(self, words: Sequence[str]) -> float:
        """In how many of the requests such a word is at most, on average over the words."""
        count = sum(self.count_at_most(hash(word)) for word in words)
        return count / max(self.requests * len(words), 1e-12)

    def typical(self, others: Iterable[WordCounts], most: int = 6) -> list[str]:
        """The words that may be shown and are more frequent here than in `others`, the clearest first.

        By the log-odds of a request having the word, in standard errors (Monroe, Colaresi and Quinn, Fightin' Words,
        2008, with a half added to each count).
        """
        rest = list(others)
        n, m = self.requests, sum(other.requests for other in rest)
        scored = []
        for key, known in self._counts.items():
            a = known.count
            if not known.text or a < ASKERS / 2:
                continue
            b = sum(other.count_at_most(key) for other in rest)
            odds = math.log((a + 0.5) / (max(n - a, 0) + 0.5)) - math.log((b + 0.5) / (max(m - b, 0) + 0.5))
            error = math.sqrt(1 / (a + 0.5) + 1 / (max(n - a, 0) + 0.5) + 1 / (b + 0.5) + 1 / (max(m - b, 0) + 0.5))
            if odds / error > TYPICAL:
                scored.append((odds / error, known.text))
        return [text for _, text in sorted(scored, reverse=True)[:most]]

    def unfading(self) -> WordCounts:
        """The same counts, which fade no more."""
        made = WordCounts()
        made.requests, made._forgotten = self.requests, self._forgotten
        made._counts = {key: replace(known) for key, known in self._counts.items()}
        return made

    def state(self) -> dict[str, Any]:
        """For JSON: the words that may be shown."""
        words = {known.text: round(known.count, 3) for known in self._counts.values() if known.text}
        unwritten = [known.count + known.missed for known in self._counts.values() if not known.text]
        forgotten = max([self._forgotten, *unwritten])
        return {"half_life": self._half_life, "requests": self.requests, "forgotten": forgotten, "words": words}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        self = cls(float(state.get("half_life", 0)))  # the last release did not write it: such counts fade no more
        self.requests, self._forgotten = float(state["requests"]), float(state["forgotten"])
        self._counts = {hash(word): _Count(float(count), text=word) for word, count in state["words"].items()}
        return self

    def _forget(self) -> None:
        """Keep the MOST frequent words."""
        every = list(self._counts.items())
        order = np.argsort([-known.count for _, known in every], kind="stable")[: MOST + 1].tolist()
        most = every[order.pop()][1]
        self._forgotten = max(self._forgotten, most.count + most.missed)
        self._counts = {every[place][0]: every[place][1] for place in order}

    def _halve(self) -> None:
        self._until_half = self._half_life
        self.requests /= 2
        self._forgotten /= 2
        for known in self._counts.values():
            known.count /= 2
            known.missed /= 2


def hashed(words: Iterable[str], leave_out: frozenset[str], most: int = 80) -> dict[int, str]:
    """By hash, up to `most` different words of a request that may say what it is about."""
    kept: dict[int, str] = {}
    for word in words:
        if word in leave_out or (len(word) < LETTERS and word[0] < "\u0370"):
            continue
        kept[hash(word)] = word
        if len(kept) >= most:
            break
    return kept
