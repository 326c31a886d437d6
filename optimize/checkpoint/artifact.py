"""A folder that appears all at once, and the digest of what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

WEIGHTS = (".safetensors", ".data", ".onnx", ".gguf")  # suffixes of files that are whole once they are written


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` by its relative name, with the sha256 of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def key(value: Any) -> str:
    """A short digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def publish(aside: Path, folder: Path) -> None:
    """`aside` becomes `folder`, whole and on disk, or not at all."""
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    _sync(folder.parent)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on disk."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as out:
        yield out
    _sync(aside)
    aside.rename(path)


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is replaced in one step."""
    with replaced(path) as out:
        out.write((json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def size(folder: Path) -> int:
    """Bytes of the files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def taken(source: str, target: str) -> None:
    """For `shutil.copytree`: a file of one step in the folder of the next. Weights are linked where the disk knows
    links, since nobody writes to them again; an index or a card may be written anew, and the step's own has to stay."""
    if Path(source).suffix in WEIGHTS:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # no links there, or no more of them
    shutil.copy2(source, target)
