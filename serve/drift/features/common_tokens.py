"""How often a text uses each of the reference's most frequent tokens, which tells genres apart as no rare word does.

    common = CommonTokens.fit(parts)    # sketches of the fitting half of a reference
    common(part)                        # (COMMON,): by how many standard deviations more often than expected

Function words and punctuation differ between authors and genres whatever the topic is (Mosteller and Wallace,
Inference and Disputed Authorship, 1964; Biber, Variation across Speech and Writing, 1988). A prompt's mean embedding
plays them down, and the surprise of its tokens adds them up. No single one says much: they have no evidence of their
own, and teach the directions of `serve.drift.detector.directions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features.token_surprise import BUCKETS, SAMPLED

COMMON = 64


@dataclass(frozen=True, slots=True, eq=False)
class CommonTokens:
    """place: (BUCKETS + 1,) which of the frequent tokens a hash is, COMMON for all others. shares: (COMMON,) of all
    tokens of the reference."""

    place: NDArray[np.uint8]
    shares: NDArray[np.float32]

    @classmethod
    def fit(cls, parts: ArrayLike) -> Self:
        """Of sketches (n, SKETCH)."""
        ids = np.asarray(parts, np.int64)[:, :SAMPLED]
        counts = np.bincount(ids[ids >= 0], minlength=BUCKETS)
        common = np.argsort(-counts, kind="stable")[:COMMON]
        # What was never counted has a share too.
        return cls.of(common, np.maximum(counts[common], 0.5) / max(counts.sum(), 1))

    @classmethod
    def of(cls, tokens: NDArray[np.integer], shares: NDArray[np.floating]) -> Self:
        """Of the hashes of the frequent tokens."""
        place = np.full(BUCKETS + 1, COMMON, np.uint8)
        place[tokens] = np.arange(COMMON)
        return cls(place, shares.astype(np.float32))

    def __call__(self, parts: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., COMMON) of sketches (..., SKETCH), Poisson's standard deviations; zeros of no token."""
        ids = parts[..., :SAMPLED].astype(np.intp).reshape(-1, SAMPLED)
        n, wide = len(ids), COMMON + 1
        places = self.place.take(ids) + np.arange(0, n * wide, wide)[:, None]
        counts = np.bincount(places.ravel(), minlength=n * wide).reshape(n, wide)[:, :COMMON]
        tokens = np.maximum(np.add.reduce(ids >= 0, axis=1), 1e-6).astype(np.float32)
        expected = self.shares * tokens[:, None]
        scores: NDArray[np.float32] = ((counts - expected) / np.sqrt(expected)).astype(np.float32)
        return scores.reshape(*parts.shape[:-1], COMMON)

    def arrays(self) -> dict[str, NDArray]:
        tokens = np.flatnonzero(self.place < COMMON)
        return {"tokens": tokens[self.place[tokens].argsort()], "shares": self.shares}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        tokens, shares = np.asarray(arrays["tokens"], np.int64), np.asarray(arrays["shares"])
        if tokens.shape != (COMMON,) or shares.shape != (COMMON,):
            raise ValueError(f"{tokens.size} frequent tokens and {shares.size} shares of them, not {COMMON}")
        return cls.of(tokens, shares)
