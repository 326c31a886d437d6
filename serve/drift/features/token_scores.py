"""The scores that are made of a sketch of a request's tokens: how surprising they are, and how frequent ones are used.

scores = TokenScores(surprise, common)
scores(parts)          # (n, SKETCH) sketches -> (n, scores.columns)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.common_tokens import COMMON, CommonTokens
from serve.drift.features.token_surprise import NAMES, TokenSurprise
from serve.drift.native import at, native


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """common: of prompts only."""

    surprise: TokenSurprise
    common: CommonTokens | None = None
    # What the C++ code takes between the sketches and the scores.
    _tables: tuple[int | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        tokens, pairs = self.surprise.tables
        common = self.common
        place, shares = (None, None) if common is None else (at(common.place), at(common.shares))
        tables = (at(tokens), len(tokens) - 1, at(pairs), len(pairs) - 1, at(self.surprise.spread), place, shares)
        object.__setattr__(self, "_tables", (*tables, self.columns - len(NAMES)))

    @property
    def columns(self) -> int:
        return len(NAMES) + (0 if self.common is None else COMMON)

    def __call__(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, columns) of sketches (n, SKETCH), whose numbers lie side by side."""
        scores = np.empty((len(parts), self.columns), np.float32)
        if (code := native()) is not None and parts.dtype == np.float32 and parts.strides[1] == 4:
            code.scores(at(parts), parts.strides[0] // 4, len(parts), *self._tables, at(scores), self.columns)
            return scores
        scores[:, : len(NAMES)] = self.surprise(parts)
        if self.common is not None:
            scores[:, len(NAMES) :] = self.common(parts)
        return scores
