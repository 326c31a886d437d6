"""How surprising a text's tokens are among those of the reference: scores that see another language or genre at once.

    part = sketch(tokens)                       # (SKETCH,) numbers, behind a request's row until it is scored
    surprise, scores = TokenSurprise.fit(parts) # of the fitting half of a reference
    surprise(part)                              # (2,): of single tokens, of pairs; also of many

The score of a text is the sum of -ln p over its tokens, less what the reference's texts have in the mean, divided by
the square root of its length: so a short text's score spreads as much as a long one's. p comes of hashed counts. What
was never counted gets the probability that Good and Turing give to the unseen (Good, Biometrika, 1953).

Of the reference only the sums over half of its requests remain. The sketch of a single request holds hashes of its
tokens and pairs, is in memory until it is scored, and is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Tokens, and pairs of tokens, that are looked at in a text: of a longer one every so many.
SAMPLED = 64
SKETCH = 2 * SAMPLED
NAMES = ("token_surprise", "pair_surprise")
_BITS = (14, 15)
BUCKETS = 1 << _BITS[0]  # of single tokens
_PLACES = np.arange(SAMPLED)
_MIX, _MIX_PAIRS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_SHIFTS = tuple(np.uint64(64 - bits) for bits in _BITS)


def sketch(tokens: ArrayLike) -> NDArray[np.float32]:
    """(SKETCH,): hashes of up to SAMPLED tokens, and of up to SAMPLED pairs; -1 where there are fewer."""
    ids = np.asarray(tokens, np.int64).view(np.uint64)
    n = len(ids)
    if n > SAMPLED:
        places = _PLACES * n // SAMPLED
        first, second = ids[places], ids[places + 1]
        single = first
    else:
        single = ids
        first = ids[:-1]
        second = ids[1:]
    part = np.full(SKETCH, -1, np.float32)
    part[: len(single)] = ((single + np.uint64(1)) * _MIX) >> _SHIFTS[0]
    part[SAMPLED : SAMPLED + len(first)] = ((first * _MIX + second) * _MIX_PAIRS) >> _SHIFTS[1]
    return part


@dataclass(frozen=True, slots=True, eq=False)
class TokenSurprise:
    """tables: -ln p by hash less its mean, and a last cell of 0 for what is missing, float16; spread: (2,)."""

    tables: tuple[NDArray[np.float16], ...]
    spread: NDArray[np.float32]

    @classmethod
    def fit(cls, parts: ArrayLike) -> tuple[Self, NDArray[np.float32]]:
        """Of the sketches (n, SKETCH) of a reference's fitting half; and their scores (n, 2), each as if it had not
        been among them."""
        ids = np.asarray(parts, np.int64)
        fits = [_fit(ids[:, i * SAMPLED : (i + 1) * SAMPLED], 1 << bits) for i, bits in enumerate(_BITS)]
        spread = np.array([max(float(scores.std()), 1e-3) for _, scores in fits], np.float32)
        scores = np.array([scores for _, scores in fits]).T / spread
        return cls(tuple(table for table, _ in fits), spread), scores.astype(np.float32)

    def __call__(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """(..., 2) of sketches (..., SKETCH)."""
        ids = parts.astype(np.intp).reshape(*parts.shape[:-1], len(self.tables), SAMPLED)
        scores = np.empty((*parts.shape[:-1], len(self.tables)), np.float32)
        for i, table in enumerate(self.tables):
            np.add.reduce(table.take(ids[..., i, :]), axis=-1, dtype=np.float32, out=scores[..., i])
        return scores / (self.spread * np.sqrt(np.maximum(np.add.reduce(ids >= 0, axis=-1), 1)))

    def arrays(self) -> dict[str, NDArray]:
        return {"tokens": self.tables[0], "pairs": self.tables[1], "spread": self.spread}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        tables = tuple(np.asarray(arrays[name], np.float16) for name in ("tokens", "pairs"))
        if [table.shape for table in tables] != [((1 << bits) + 1,) for bits in _BITS]:
            raise ValueError(f"token tables have the shapes {[table.shape for table in tables]}")
        if (spread := np.asarray(arrays["spread"], np.float32)).shape != (len(_BITS),):
            raise ValueError(f"the spread of the tokens' scores has the shape {spread.shape}")
        return cls(tables, spread)


def _fit(ids: NDArray[np.int64], buckets: int) -> tuple[NDArray[np.float16], NDArray[np.float64]]:
    """The table of one kind of hashes, (n, SAMPLED), and the scores (n,) by it, of no unit spread yet."""
    there = ids >= 0
    rows, flat = np.nonzero(there)[0], ids[there]
    counts = np.bincount(flat, minlength=buckets).astype(np.float64)
    total = counts.sum()
    # Each text is scored without itself: with itself in the counts it would surprise less than any later one.
    _, inverse, own = np.unique(rows * buckets + flat, return_inverse=True, return_counts=True)
    unseen = (np.count_nonzero(counts == 1) + 1) / (total + 2)
    empty = max(np.count_nonzero(counts == 0), 1)

    lengths = np.maximum(np.add.reduce(there, axis=1), 1)

    def surprise(of: NDArray[np.float64], among: ArrayLike) -> NDArray[np.float64]:
        once = (1 - unseen) / np.maximum(among, 1)
        return -np.log(np.where(of > 0, of * once, np.minimum(unseen / empty, once / 2)))

    scores = surprise(counts[flat] - own[inverse], total - lengths[rows])
    mean = scores.mean() if len(scores) else 0.0
    sums = np.bincount(rows, scores - mean, minlength=len(ids))
    table = np.append(surprise(counts, total) - mean, 0)
    return table.astype(np.float16), sums / np.sqrt(lengths)
