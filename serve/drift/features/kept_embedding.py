"""Embeddings that were computed at an earlier start: mapped from files, so that only the rows in use are in memory.

A large table takes seconds to project. What came of it is kept by the identity of the file that it was read from: its
path, number, size and time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from serve.drift.features.embedding import DIMENSIONS, Embedding
from serve.files import fsync
from serve.models.cache import aside
from serve.models.input_embedding import source

log = logging.getLogger(__name__)

# Raised when an embedding of the same table would be another one.
VERSION = 1
# Embeddings that are kept; tens of megabytes each.
KEPT = 4
_ARRAYS = ("table", "weights", "numbers", "narrow")


def embedding_of(checkpoint: Path, cache: Path) -> Embedding:
    """As `Embedding.of`, from the cache folder where it is there."""
    folder = cache / _key(checkpoint)
    if (kept := _read(folder)) is not None:
        return kept
    made = Embedding.of(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)  # it is damaged, if it is there
    try:
        _write(made, folder)
    except OSError as error:
        log.info("the embedding of %s is computed at every start: %s", checkpoint.name, error)
        return made
    return _read(folder) or made


def _key(checkpoint: Path) -> str:
    """Of all that goes into an embedding."""
    weights, tensor = source(checkpoint)
    told: list[object] = [VERSION, DIMENSIONS, tensor]
    for file in (weights, checkpoint / "tokenizer.json", checkpoint / "vocab.json"):
        with suppress(FileNotFoundError):
            state = file.resolve().stat()
            told += [str(file.resolve()), state.st_ino, state.st_size, state.st_mtime_ns]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _read(folder: Path) -> Embedding | None:
    try:
        digest = (folder / "digest").read_text()
        # Not as memmap, whose views cost more than the rows that are taken.
        arrays = {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in folder.glob("*.npy")}
        with suppress(OSError):  # it is in use, which a folder that others made need not know
            os.utime(folder)
        return Embedding(digest=digest, **arrays)
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _write(made: Embedding, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder.parent, folder.name) as written:
        for name in _ARRAYS:
            if (array := getattr(made, name)) is not None:
                np.save(written / f"{name}.npy", array)
        (written / "digest").write_text(made.digest)
        for file in written.iterdir():  # after a power failure a table would be as long, and zeros
            fsync(file)
        with suppress(OSError):  # another server was first
            written.rename(folder)
    others = sorted((each for each in folder.parent.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    for old in others[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
