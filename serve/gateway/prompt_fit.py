"""How well a prompt fits what each version is asked, by the tokens that drift has counted of its reference.

    fit = PromptFit(counts)            # of several versions over one tokenizer
    nats, strangeness = fit(tokens)    # (versions,) each

`nats` is ln of how probable the prompt's tokens are among those of a reference, of single tokens and, for a quarter,
of pairs: the difference of two says by how much better the prompt fits the one. `strangeness` is how surprising they
are to a reference, in standard deviations of its own prompts. Both come of the hashed counts of
`features.token_surprise`, of all prompts of a reference: no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features.shared_ends import Read
from serve.drift.features.token_surprise import SAMPLED, sketch
from serve.drift.reference_counts import Counts

# What single tokens and pairs say of a prompt: pairs are rarer, and more of them were never counted.
WEIGHTS = (0.75, 0.25)
# Versions whose mean stands for all other prompts, at most.
MOST_POOLED = 16


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
