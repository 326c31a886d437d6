"""Files that strangers wrote: what their names and first bytes say, and how they are read and kept safely."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from serve.adapters.adapter import ABSENT, CONFIG, WEIGHTS
from serve.errors import AdapterRejected, OutOfSpace
from serve.names import shown

BOTH_FILES = f"send {CONFIG} and {WEIGHTS}, or one .zip, .tar.gz or .tar.zst of them, or one .gguf"
NO_PICKLES = (
    "is a pickle, which this server never opens: it takes safetensors only; load the adapter with PEFT and save it "
    "with save_pretrained(..., safe_serialization=True)"
)

_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
# O_PATH needs no right to list a folder; elsewhere than on Linux reading it has to do.
_WALKING = os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", os.O_RDONLY)
_SHOWN_PROBLEMS = 200
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LEFT_OVER = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"}
_LEFT_OVER_STARTS = ("rng_state", "random_states", "._")


def open_plain(path: Path, *, real: bool = False) -> BinaryIO:
    """A plain file, or AdapterRejected: no link, no pipe, no folder.

    Of a path that is `real`, as `os.path.realpath` gives it, no folder may be a link either: none was when it was
    judged, and one that is there now was put there since.
    """
    try:
        file = _open_real(path) if real else os.open(path, _READING)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterRejected(
            f"{path.name} is missing; an adapter is {CONFIG} and {WEIGHTS} side by side", code=ABSENT
        ) from None
    except OSError as refused:
        raise AdapterRejected(f"{path.name} cannot be read ({refused.strerror}); send a plain file") from refused
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise AdapterRejected(f"{path.name} is not a plain file; send a plain file")
    return os.fdopen(file, "rb")


def _open_real(path: Path) -> int:
    folder = os.open(path.anchor, _WALKING)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _WALKING, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _READING, dir_fd=folder)
    finally:
        os.close(folder)


def parse_json(data: bytes, what: str) -> Any:
    """JSON without repeated keys, NaN or infinity; AdapterRejected calls it `what`."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as wrong:
        reason = "too deeply nested" if isinstance(wrong, RecursionError) else shown(wrong)
        raise AdapterRejected(
            f"{what} is not the JSON it should be ({reason}); send the file as PEFT saved it"
        ) from wrong


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def sniff(head: bytes) -> str | None:
    """What these first bytes are, if they are something that people send instead of safetensors."""
    if head.startswith(b"PK\x03\x04"):
        return "a zip file, which is how PyTorch writes pickles (.bin, .pt)"
    if re.match(rb"\x80[\x02-\x05][cX}\]\x8a\x95(q]", head):
        return "a Python pickle"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file it points to"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file"
    if head.lstrip()[:1] == b"<":
        return "an HTML page"
    return None


def rejected(problems: list[str], opening: str) -> AdapterRejected:
    """One error for all that is wrong: the first problem in a sentence after `opening`, and the list of them."""
    sentence = f"{opening}: {problems[0]}"
    if len(problems) > 1:
        sentence = f"{opening}: {len(problems)} things are wrong, first of all that {problems[0]}"
    more = len(problems) - _SHOWN_PROBLEMS
    listed = problems if more <= 0 else [*problems[:_SHOWN_PROBLEMS], f"... and {more} more"]
    return AdapterRejected(sentence, problems=listed)


def is_left_over(filename: str) -> bool:
    """What a trainer leaves in the same folder; it is passed over, unread."""
    return filename in _LEFT_OVER or filename.startswith(_LEFT_OVER_STARTS)


def is_pickle(filename: str) -> bool:
    """By its name, weights in a form that is never opened."""
    return filename.lower().endswith(_PICKLE_ENDINGS) and not is_left_over(filename)


def create(path: Path) -> IO[bytes]:
    """A new private file; writes to it are not buffered."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb", buffering=0)


def write(sink: IO[bytes], data: bytes | memoryview) -> None:
    """All of `data`; OutOfSpace when the disk is full."""
    view = memoryview(data)
    try:
        while view:
            view = view[sink.write(view) :]
    except OSError as full:
        if full.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutOfSpace("the disk is full; delete adapters or make room, then send it again") from full
