"""A GGUF file as a Hugging Face checkpoint in the cache, made once.

A file that was replaced is another one, by its size and time; what was made of the one before goes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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


class Form(StrEnum):
    """What becomes of a file's weights."""

    KEPT = "kept"  # in the file's own blocks, as far as the kernels multiply them
    BFLOAT16 = "bfloat16"


def ensure(path: Path, cache: Path, progress: Callable[[str], None], form: Form = Form.BFLOAT16) -> Path:
    """The checkpoint of this file, made where it is absent. ConfigError: why it cannot be."""
    stem = f"gguf-{_plain(model_name(path.name))[:60]}-{_key(path)}"
    folder = cache / f"{stem}{'-kept' * (form is Form.KEPT)}-r{REVISION}"
    if (folder / NOTE).is_file():
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
            _forget_earlier(path, stem, cache)
            progress(f"{path.name}: ready in {folder}")
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


def _forget_earlier(path: Path, stem: str, cache: Path) -> None:
    for other in cache.glob("gguf-*"):
        try:
            said = json.loads((other / NOTE).read_text())["path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        now = re.fullmatch(rf"{re.escape(stem)}(-kept)?-r{REVISION}", other.name)
        if not now and said == str(path.resolve()):
            shutil.rmtree(other, ignore_errors=True)


def _key(path: Path) -> str:
    """Another one when the file, or one of its parts, is another."""
    digest = hashlib.sha256(path.name.encode())
    for part in parts_of(path):
        known = part.stat()
        digest.update(f"{part.resolve()} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def parts_of(path: Path) -> list[Path]:
    """The file, or all parts of its model that are there."""
    stem = path.name.removesuffix(SUFFIX)
    return sorted(path.parent.glob(f"{PART.sub('', stem)}-*-of-*{SUFFIX}")) if PART.search(stem) else [path]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)
