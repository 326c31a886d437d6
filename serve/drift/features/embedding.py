"""A prompt as a short vector: the mean of its tokens' rows in the model's own embedding table, projected once.

    embedding = Embedding.of(checkpoint)      # reads one tensor of the checkpoint, seconds at most, once an engine
    embedding.vector(token_ids)               # (32,) float32
    embedding.mean_row(token_ids)             # (up to 384,) float32: for serve.drift.detector.mean_rows

No second model, no GPU, and adapters of one base share it. `numbers` says which tokens are made of digits, where the
checkpoint has a tokenizer.json or vocab.json. Frequent tokens weigh less (smooth inverse frequency, Arora
et al. 2017); their frequency is taken from their number, since tokenizers number merges in the order of frequency.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.models.input_embedding import Rows, rows
from serve.models.number_tokens import number_tokens

DIMENSIONS = 32
# Arora's a: tokens rarer than this keep their weight, commoner ones lose it.
SIF = 1e-3
# Numbers of a mean row, and how many tokens it is the mean of: of a longer prompt every so many. A sum of so many
# numbers of eight bits fits sixteen.
MEAN_WIDTH, MEAN_TOKENS = 384, 256
# A mean of few tokens says little: it is taken with so many more of zeros, so that short prompts spread no more than
# long ones.
NOTHING = 16
# What an eight-bit number stands for at most, in standard deviations of the table.
_FARTHEST = 6.0
_CHUNK = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """table: (vocabulary, dimensions) float32, projected; weights: (vocabulary,). `digest` names both, and the seed.

    numbers: (vocabulary + 1,) whether a token is made of digits, the last one standing for tokens outside the table.
    narrow: (vocabulary, up to MEAN_WIDTH) the table with fewer columns, eight bits a number.
    """

    table: NDArray[np.float32]
    weights: NDArray[np.float32]
    digest: str
    numbers: NDArray[np.bool_] | None = None
    narrow: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        for name in ("table", "weights", "narrow"):
            array, dtype = getattr(self, name), np.int8 if name == "narrow" else np.float32
            object.__setattr__(self, name, None if array is None else np.ascontiguousarray(array, dtype))

    @property
    def dimensions(self) -> int:
        return self.table.shape[1]

    @classmethod
    def of(cls, checkpoint: Path, *, dimensions: int = DIMENSIONS, seed: int = 0) -> Self:
        """Of a checkpoint folder: one safetensors file or shards, of floats or of a GGUF file's blocks, tied or not."""
        projected = cls.project(rows(checkpoint), dimensions=dimensions, seed=seed)
        return replace(projected, numbers=number_tokens(checkpoint, len(projected.table)))

    @classmethod
    def project(cls, source: Rows | NDArray[np.floating], *, dimensions: int = DIMENSIONS, seed: int = 0) -> Self:
        """Of a table (vocabulary, width) that is in memory, or mapped."""
        vocabulary, width = source.shape
        rng = np.random.Generator(np.random.PCG64(seed))
        onto = rng.standard_normal((width, min(dimensions, width)))
        onto = np.linalg.qr(onto)[0].astype(np.float32)
        table = np.empty((vocabulary, onto.shape[1]), np.float32)
        for start in range(0, vocabulary, _CHUNK):
            table[start : start + _CHUNK] = np.asarray(source[start : start + _CHUNK], np.float32) @ onto
        scale = float(table.std()) or 1.0
        table /= scale
        # Zipf: the token of rank r comes with probability 1 / (r H).
        frequency = 1 / (np.arange(1, vocabulary + 1) * (math.log(vocabulary) + 0.5772))
        weights = (SIF / (SIF + frequency)).astype(np.float32)
        # A bit of rounding in the product would be another digest on another machine: so over what went in.
        digest = hashlib.sha256(f"{vocabulary} {width} {dimensions} {seed} {SIF}".encode())
        for start in range(0, vocabulary, _CHUNK):
            digest.update(np.ascontiguousarray(source[start : start + _CHUNK], np.float32).tobytes())
        return cls(table, weights, digest.hexdigest(), narrow=_narrow(source))

    def vector(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """(dimensions,): weighted mean of the tokens' rows; zeros of nothing. Numbers outside the table (added tokens)
        are left out."""
        ids = np.asarray(tokens, np.int64)
        ids = _known(ids, len(self.table))
        if not ids.size:
            return np.zeros(self.table.shape[1], np.float32)
        weights = self.weights.take(ids)
        return (weights @ self.table.take(ids, axis=0)) / np.add.reduce(weights)

    def mean_row(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """(up to MEAN_WIDTH,): mean of up to MEAN_TOKENS tokens' rows, frequent ones too, and of NOTHING rows of
        zeros; nothing where it is not known."""
        if self.narrow is None:
            return np.zeros(0, np.float32)
        ids = np.asarray(tokens, np.int64)
        if ids.size > MEAN_TOKENS:
            ids = ids[np.arange(MEAN_TOKENS) * ids.size // MEAN_TOKENS]
        ids = _known(ids, len(self.narrow))
        total = np.add.reduce(self.narrow.take(ids, axis=0), axis=0, dtype=np.int16)
        return total.astype(np.float32) / np.float32(ids.size + NOTHING)


def _known(ids: NDArray[np.int64], vocabulary: int) -> NDArray[np.int64]:
    """Those that are in the table."""
    # As unsigned numbers the negative ones are the largest.
    if ids.size and np.maximum.reduce(ids.view(np.uint64)) >= vocabulary:
        return ids[(ids >= 0) & (ids < vocabulary)]
    return ids


def _narrow(source: Rows | NDArray[np.floating]) -> NDArray[np.int8]:
    """A table (vocabulary, width) with at most MEAN_WIDTH columns: sums of columns with random signs (count sketch;
    Charikar, Chen and Farach-Colton, Theoretical Computer Science 312, 2004)."""
    vocabulary, width = source.shape
    rng = np.random.Generator(np.random.PCG64(0))
    order, signs = rng.permutation(width), rng.choice(np.array([-1, 1], np.float32), width)
    columns = min(width, MEAN_WIDTH)
    first = np.arange(columns) * width // columns
    narrow, unit = np.empty((vocabulary, columns), np.int8), 0.0
    for start in range(0, vocabulary, _CHUNK):
        rows = np.asarray(source[start : start + _CHUNK], np.float32)[:, order] * signs
        rows = np.add.reduceat(rows, first, axis=1)
        unit = unit or max(float(rows.std()), 1e-9) * _FARTHEST / 127
        narrow[start : start + _CHUNK] = np.clip(np.rint(rows / unit), -127, 127)
    return narrow
