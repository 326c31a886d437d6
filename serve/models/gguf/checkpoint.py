"""A GGUF file as a Hugging Face checkpoint in the cache, made once.

A file that was replaced is another one, by its size and time; what was made of the one before goes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from serve.errors import ConfigError
from serve.files import fsync_tree, rename
from serve.models.cache import aside, check_room, locked, readable, sentences
from serve.models.gguf.file import GGUF
from serve.models.gguf.names import PART, SUFFIX, model_name

NOTE = "gguf.json"
REVISION = 2  # counts up when the conversion changes
REFUSED = 200  # the exit of a conversion that says why; below are numbers of the system's errors
BESIDE = 64 << 20  # bytes of everything but weights
_held: dict[Path, int] = {}  # open files of the checkpoints that this process uses


class Form(StrEnum):
    """What becomes of a file's weights."""

    KEPT = "kept"  # in the file's own blocks, as far as the kernels multiply them
    BFLOAT16 = "bfloat16"


def ensure(path: Path, cache: Path, progress: Callable[[str], None], form: Form = Form.BFLOAT16) -> Path:
    """The checkpoint of this file, made where it is absent. ConfigError: why it cannot be.

    As long as this process lives, no other removes it.
    """
    stem = _stem(path)
    folder = cache / f"{stem}{'-kept' * (form is Form.KEPT)}-r{REVISION}"
    if _used(folder):
        return folder
    tensors = GGUF.open(path).tensors.values()
    nbytes = BESIDE + sum(tensor.nbytes if form is Form.KEPT else 2 * tensor.weights for tensor in tensors)
    with sentences(path.name, cache, nbytes), locked(cache, folder.name):
        if not (folder / NOTE).is_file():  # someone else made it while we waited for the lock
            shutil.rmtree(folder, ignore_errors=True)
            check_room(cache, nbytes)
            what = "a checkpoint with its weights as they are" if form is Form.KEPT else "a bfloat16 checkpoint"
            progress(f"{path.name}: making {what}, {nbytes / 1e9:.1f} GB, once")
            with aside(cache, folder.name) as made:
                convert(path, made, lambda share: progress(f"{path.name}: {share}"), form)
                readable(made)
                fsync_tree(made)
                rename(made, folder)
            _forget_earlier(path, cache)
            progress(f"{path.name}: ready in {folder}")
        _used(folder)
    return folder


def to_train(folder: Path) -> Path:
    """The checkpoint that training reads: where `folder` has a file's weights as they are, one in bfloat16 beside it.

    ConfigError: the file is not there any more.
    """
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return folder
    if note.get("form") != Form.KEPT:
        return folder
    path = Path(note["file"])
    if not path.is_file():
        raise ConfigError(f"{path}, which {folder.name} was made of, is not there any more: training reads it")
    return ensure(path, folder.parent, lambda line: print(line, file=sys.stderr, flush=True))


def convert(path: Path, folder: Path, progress: Callable[[str], None], form: Form = Form.BFLOAT16) -> None:
    """Write the checkpoint into this empty folder, by a process of its own. ConfigError: why it cannot be."""
    root = str(Path(__file__).resolve().parents[3])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "serve.models.gguf.conversion", str(path), str(folder), form]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environ, text=True, **pipes) as process:  # type: ignore[call-overload]
        for line in process.stdout:
            progress(line.strip())
        said = process.stderr.read().strip()
    last = (said.splitlines() or [""])[-1]
    if process.returncode == REFUSED:
        raise ConfigError(last)
    if process.returncode in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(process.returncode, os.strerror(process.returncode))
    if "ModuleNotFoundError" in last or "ImportError" in last:
        raise ConfigError(f"{path.name} cannot be read here ({last}): install loradock[cpu] or loradock[gpu]")
    if process.returncode:
        raise ConfigError(f"{path.name} could not be read: {last[:300] or f'exit {process.returncode}'}")


def _used(folder: Path) -> bool:
    """Whether the checkpoint is there; then it stays, as long as this process and those that it forks hold the lock."""
    try:
        note = os.open(folder / NOTE, os.O_RDONLY)
    except OSError:
        return False
    with suppress(OSError):  # no locks on this disk
        fcntl.flock(note, fcntl.LOCK_SH)
    before = _held.pop(folder, None)
    if before is not None:
        os.close(before)
    if not (folder / NOTE).is_file():  # it was removed before it was locked
        os.close(note)
        return False
    _held[folder] = note
    return True


def _forget_earlier(path: Path, cache: Path) -> None:
    """Remove what was made of this file as it was before, but what another server has: its engine may start again.

    A file may have several names, by links: what was made by each of them is of the file as it is.
    """
    for other in cache.glob("gguf-*"):
        try:
            note = json.loads((other / NOTE).read_text())
            if note["path"] != str(path.resolve()) or _is_of(other, Path(note["file"])):
                continue
            with (other / NOTE).open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _is_of(folder: Path, path: Path) -> bool:
    """Whether the folder's checkpoint was made of the file that is there now."""
    try:
        return re.fullmatch(rf"{re.escape(_stem(path))}(-kept)?-r{REVISION}", folder.name) is not None
    except OSError:
        return False


def _stem(path: Path) -> str:
    return f"gguf-{_plain(model_name(path.name))[:60]}-{_key(path)}"


def _key(path: Path) -> str:
    """Another one when the file, or one of its parts, is another."""
    digest = hashlib.sha256(path.name.encode())
    for part in parts_of(path):
        known = part.stat()
        digest.update(f"{part.resolve()} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def parts_of(path: Path) -> list[Path]:
    """The file, or all parts of its model that are there."""
    part = PART.search(path.name.removesuffix(SUFFIX))
    if part is None:
        return [path]
    count = int(part[1])
    before = path.name[: part.start()]
    named = (path.with_name(f"{before}-{number:05d}-of-{count:05d}{SUFFIX}") for number in range(1, count + 1))
    return [file for file in named if file.is_file()]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)
