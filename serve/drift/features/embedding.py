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
import json
import logging
import math
import mmap
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.errors import ConfigError
from serve.models.gguf.kept import inputs_of, types_of, values_of

log = logging.getLogger(__name__)

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
# What the input embedding is called in the checkpoints of the architectures that vLLM serves; the output's stands for
# it where the two are tied and only that one was saved.
NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "embeddings.weight",
    "embedding.weight",
    "lm_head.weight",
)
_CHUNK = 8192
# A token of digits, with what tokenizers write for a space before it or for the inside of a word.
_NUMBER = re.compile(r"[ \u0120\u2581]*(?:##)?\d+")


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

    @property
    def mean_width(self) -> int:
        """Numbers of a mean row."""
        return 0 if self.narrow is None else self.narrow.shape[1]

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


class Rows:
    """A matrix in a safetensors file, mapped: slices of it become float32, the rest stays on the disk.

    `kept` is the type of its blocks where they are those of a GGUF file, and `shape` then counts bytes.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int], offset: int, kept: str = "") -> None:
        self.shape = (shape[0], inputs_of(kept, shape[1])) if kept else shape
        self._bf16 = dtype == "BF16"
        self._kept = kept
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1"}[dtype]
        self._map = np.memmap(path, kind, "r", offset, shape)

    def __getitem__(self, which: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        part = np.asarray(self._map[which])
        if self._kept:
            read = values_of(self._kept, part)
        else:
            # The upper half of a float32.
            read = (part.astype(np.uint32) << 16).view(np.float32) if self._bf16 else part.astype(np.float32)
        with suppress(AttributeError, OSError, ValueError):  # the pages that were read count as this process's memory
            self._map._mmap.madvise(mmap.MADV_DONTNEED)
        return read


def rows(checkpoint: Path) -> Rows:
    """The input embedding of a checkpoint folder, or ConfigError with the reason."""
    return _open(*source(checkpoint))


def source(checkpoint: Path) -> tuple[Path, str]:
    """The file that the input embedding of a checkpoint folder is in, and its name there."""
    for name in NAMES:
        for tensor, path in sorted(_where(checkpoint).items()):
            if tensor == name or tensor.endswith("." + name):
                return path, tensor
    raise ConfigError(
        f"{checkpoint.name} has no tensor that is called like an input embedding ({', '.join(NAMES[:3])}, ...), "
        "so its prompts cannot be watched for drift; switch drift off for this model"
    )


def number_tokens(checkpoint: Path, vocabulary: int) -> NDArray[np.bool_] | None:
    """(vocabulary + 1,) which tokens of a checkpoint folder are made of digits; None where its files do not say."""
    numbers = np.zeros(vocabulary + 1, np.bool_)
    try:
        if (file := checkpoint / "tokenizer.json").is_file():
            tokens = json.loads(file.read_bytes())["model"]["vocab"]
        elif (file := checkpoint / "vocab.json").is_file():
            tokens = json.loads(file.read_bytes())
        else:
            return None
        # Unigram tokenizers list (token, score) in the order of their numbers.
        pairs = tokens.items() if isinstance(tokens, dict) else ((entry[0], i) for i, entry in enumerate(tokens))
        for token, number in pairs:
            if 0 <= number < vocabulary and _NUMBER.fullmatch(token):
                numbers[number] = True
    except (OSError, ValueError, KeyError, TypeError, IndexError) as damaged:
        log.warning("%s: which tokens are numbers is not known: %s", file, damaged)
        return None
    return numbers


def _where(checkpoint: Path) -> dict[str, Path]:
    """Every tensor's file."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = dict(json.loads(index.read_bytes())["weight_map"])
        except (ValueError, KeyError, TypeError) as damaged:
            raise ConfigError(f"{index.name} cannot be read ({damaged}); fetch the checkpoint again") from damaged
        return {tensor: checkpoint / str(shard) for tensor, shard in shards.items()}
    tensors = {tensor: path for path in sorted(checkpoint.glob("*.safetensors")) for tensor in _header(path)[0]}
    if not tensors:
        raise ConfigError(f"{checkpoint.name} holds no safetensors file; drift needs the embedding table of the model")
    return tensors


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors of a safetensors file, and where their bytes begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100 << 20:
                raise ValueError("its header is larger than the format allows")
            tensors = json.loads(file.read(length))
    except (OSError, ValueError) as damaged:
        raise ConfigError(f"{path.name} is not a safetensors file ({damaged}); fetch the checkpoint again") from damaged
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def _open(path: Path, tensor: str) -> Rows:
    tensors, begin = _header(path)
    entry = tensors.get(tensor)
    if entry is None:
        raise ConfigError(f"the index names {path.name} for {tensor}, which is not in it; fetch the checkpoint again")
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    kept = types_of(path.parent).get(tensor.removesuffix(".weight"), "") if dtype == "U8" else ""
    if not (kept or dtype in ("BF16", "F16", "F32")) or len(shape) != 2:
        raise ConfigError(
            f"{tensor} is {dtype} {list(shape)}; drift reads an embedding of two dimensions in BF16, F16 or F32"
        )
    start, end = entry["data_offsets"]
    if path.stat().st_size < begin + end:
        raise ConfigError(f"{path.name} was cut short; fetch the checkpoint again")
    return Rows(path, dtype, shape, begin + start, kept)
