"""Which of two topics each example is about, by the words of what is asked: spherical k-means with k = 2.

It says nothing of what a topic is. The gate asks what becomes of its evidence when one of them grows.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.loop.examples import question
from serve.loop.likelihood import Example

_WORD = re.compile(r"\w{3,}")
# Words are hashed to so many numbers; of a question so many characters are read.
WIDTH, READ = 512, 2000
# How often centres move, at most.
ROUNDS = 12


def topics(examples: Sequence[Example]) -> list[int]:
    """0 or 1 for each."""
    rows = np.zeros((len(examples), WIDTH))
    for row, example in zip(rows, examples, strict=True):
        words = {zlib.crc32(word.encode()) % WIDTH for word in _WORD.findall((question(example) or "")[:READ].lower())}
        row[list(words)] = 1
    if len(rows) < 2:
        return [0] * len(rows)
    rows *= np.log((len(rows) + 1) / (rows.sum(axis=0) + 1))  # what all have tells nothing apart
    rows = _unit(rows)
    # The first direction of the spread halves them to begin with.
    away = rows - rows.mean(axis=0)
    inside: NDArray[np.bool_] = away @ np.linalg.svd(away, full_matrices=False)[2][0] > 0
    for _ in range(ROUNDS):
        if not 0 < inside.sum() < len(rows):
            break
        centres = _unit(np.array([rows[~inside].sum(axis=0), rows[inside].sum(axis=0)]))
        near = rows @ centres.T
        inside, before = near[:, 1] > near[:, 0], inside
        if (inside == before).all():
            break
    return inside.astype(int).tolist()


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1e-12)
    return unit
