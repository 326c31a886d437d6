"""How well a prompt fits what each version is asked, by the tokens that drift has counted of its reference.

    fits.note(watched)                 # the monitor's, once a reference is complete or was read
    fit = PromptFit(counts)            # of several versions over one tokenizer
    nats, strangeness = fit(tokens)    # (versions,) each

`nats` is ln of how probable the prompt's tokens are among those of a reference, of single tokens and, for a quarter,
of pairs: the difference of two says by how much better the prompt fits the one. `strangeness` is how surprising they
are to a reference, in standard deviations of its own prompts. Both come of the hashed counts of
`features.token_surprise`, of all prompts of a reference: no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features.features import PROMPT
from serve.drift.features.request_text import RequestText
from serve.drift.features.shared_ends import Read, SharedEnds
from serve.drift.features.token_surprise import SAMPLED, TokenSurprise, sketch
from serve.drift.watched_version import WatchedVersion

# What single tokens and pairs say of a prompt: pairs are rarer, and more of them were never counted.
WEIGHTS = (0.75, 0.25)
# Versions whose mean stands for all other prompts, at most.
MOST_POOLED = 16
# Versions whose counts are in memory for this, 100 KB each; the oldest make room.
MOST = 512


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What is counted of one version's reference; `text` is its base's tokenizer. `id` of a base is its name. `shared`
    knows what its prompts begin and end with alike, which is no part of the reference; the watcher's thread adds to it.
    """

    adapter: str
    id: str
    base: str
    surprise: TokenSurprise
    text: RequestText
    shared: SharedEnds


class PromptFit:
    """counts: of versions of one base."""

    def __init__(self, counts: Sequence[Counts]) -> None:
        self.counts = tuple(counts)
        self.adapters = tuple(each.adapter for each in counts)
        self.text = counts[0].text
        # (versions, buckets + 1) of single tokens and of pairs, and what makes probabilities of them.
        self._tables = [np.stack([each.surprise.tables[kind] for each in counts]) for kind in (0, 1)]
        self._norms = [_log_sums(table[:, :-1]) for table in self._tables]
        self._spread = np.stack([each.surprise.spread for each in counts])

    def __call__(self, tokens: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """nats, strangeness: (versions,) each. What a version's prompts begin or end with alike is taken as given."""
        nats, strangeness = self._judged(tokens, slice(None))
        read: Read | None = None
        for place, counts in enumerate(self.counts):
            shared = counts.shared
            if shared.openings or shared.endings:
                read = read or Read.of(tokens, shared.numbers)
                own = shared.own(read)
                if len(own) < len(read.words.tokens):
                    one = slice(place, place + 1)
                    nats[one], strangeness[one] = self._judged(own, one)
        return nats, strangeness

    def rest(self, places: Sequence[int]) -> Rest:
        """What stands for all other prompts where nothing else does: the mean of these versions' probabilities."""
        pooled = list(places[:MOST_POOLED])
        means = []
        for table, norms in zip(self._tables, self._norms, strict=True):
            chances = np.exp(-table[pooled].astype(np.float32) - norms[pooled, None]).mean(axis=0)
            chances[-1] = 1  # of what is missing
            means.append(np.log(chances))
        return Rest(means)

    def _judged(self, tokens: ArrayLike, which: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        ids = sketch(tokens).astype(np.intp).reshape(2, SAMPLED)
        counts = np.add.reduce(ids >= 0, axis=1)
        nats = strangeness = np.zeros(len(self.adapters[which]), np.float32)
        for kind, table in enumerate(self._tables):
            # What is missing takes the last cell, which holds 0.
            surprise = np.add.reduce(table[which].take(ids[kind], axis=1), axis=1, dtype=np.float32)
            nats = nats - (surprise + counts[kind] * self._norms[kind][which]) * WEIGHTS[kind]
            strangeness = strangeness + surprise / (self._spread[which, kind] * np.sqrt(max(counts[kind], 1))) / 2
        return nats, strangeness


class Rest:
    """logs: (buckets + 1,) ln of the probability of single tokens and of pairs, 0 of what is missing."""

    def __init__(self, logs: Sequence[NDArray[np.float32]]) -> None:
        self._logs = logs

    def __call__(self, tokens: ArrayLike) -> float:
        """nats, as of a version."""
        ids = sketch(tokens).astype(np.intp).reshape(2, SAMPLED)
        return sum(
            weight * float(np.add.reduce(logs.take(kind)))
            for weight, logs, kind in zip(WEIGHTS, self._logs, ids, strict=True)
        )


def _log_sums(table: NDArray[np.float16]) -> NDArray[np.float32]:
    """(versions,): ln of the sum of exp(-table); of -ln p less any constant it is that constant."""
    values = -table.astype(np.float32)
    most = values.max(axis=1, keepdims=True)
    return (most[:, 0] + np.log(np.exp(values - most).sum(axis=1))).astype(np.float32)


class PromptFits:
    """`look(adapter, version, id)` notes what is kept of a version; whether it has a reference. `of`, `changes` and
    `is_missing` are for any thread, `find` for the watcher's, the rest is the monitor's, who holds its lock."""

    def __init__(self, look: Callable[[str, str, str], bool]) -> None:
        self._look = look
        self._counts: dict[str, Counts] = {}
        self._sought: set[str] = set()
        # Rises with each change.
        self.changes = 0

    def of(self, id: str) -> Counts | None:
        """What is counted of the version, as far as that is known."""
        return self._counts.get(id)

    def is_missing(self, id: str) -> bool:
        """Nothing is known of the version, and nobody has looked for it yet; who asks is to have it found."""
        if id in self._counts or id in self._sought:
            return False
        self._sought.add(id)
        return True

    def find(self, versions: Sequence[tuple[str, str, str]]) -> None:
        """Read the first of these versions, (adapter, version, id), of which there is a reference."""
        for version in versions:
            if self._look(*version):
                return

    def note(self, watched: WatchedVersion) -> bool:
        """Take what is counted of a version's reference, if it is complete."""
        signal, id = watched.baseline.signals[PROMPT], watched.id or watched.adapter
        surprise = signal.whole or signal.surprise  # references of earlier releases have the one alone
        if surprise is None or watched.text is None:
            return False
        known = self._counts.get(id)
        if known is None or known.surprise is not surprise:
            watched.text.special  # noqa: B018 - the tokenizer is read here, and not when a request waits
            shared = watched.thinning.shared
            new = Counts(watched.adapter, id, watched.base, surprise, watched.text, shared)
            counts = {**self._counts, id: new}
            while len(counts) > MOST:
                del counts[next(iter(counts))]
            self._replace(counts)
        return True

    def forget(self, id: str) -> None:
        """A version was removed."""
        if id in self._counts:
            self._replace({key: counts for key, counts in self._counts.items() if key != id})

    def drop(self, base: str) -> None:
        """Another model is behind this base."""
        self._sought.clear()
        self._replace({key: counts for key, counts in self._counts.items() if counts.base != base})

    def _replace(self, counts: dict[str, Counts]) -> None:
        self._counts = counts
        self.changes += 1
