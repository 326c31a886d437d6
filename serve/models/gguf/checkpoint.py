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
from pathlib import Path

from serve.errors import ConfigError
from serve.files import fsync_tree, rename
from serve.models.cache import aside, check_room, locked, readable, sentences
from serve.models.gguf.file import GGUF
from serve.models.gguf.names import PART, SUFFIX, model_name

NOTE = "gguf.json"
REVISION = 1  # counts up when the conversion changes
REFUSED = 200  # the exit of a conversion that says why; below are numbers of the system's errors
BESIDE = 64 << 20  # bytes of everything but weights


def ensure(path: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    """The checkpoint of this file, made where it is absent. ConfigError: why it cannot be."""
    folder = cache / f"gguf-{_plain(model_name(path.name))[:60]}-{_key(path)}-r{REVISION}"
    if (folder / NOTE).is_file():
        return folder
    nbytes = BESIDE + 2 * sum(tensor.weights for tensor in GGUF.open(path).tensors.values())
    with sentences(path.name, cache, nbytes), locked(cache, folder.name):
        if not (folder / NOTE).is_file():  # someone else made it while we waited for the lock
            shutil.rmtree(folder, ignore_errors=True)
            check_room(cache, nbytes)
            progress(f"{path.name}: making a bfloat16 checkpoint of {nbytes / 1e9:.1f} GB, once")
            with aside(cache, folder.name) as made:
                convert(path, made, lambda share: progress(f"{path.name}: {share}"))
                readable(made)
                fsync_tree(made)
                rename(made, folder)
            _forget_earlier(path, folder, cache)
            progress(f"{path.name}: ready in {folder}")
    return folder


def convert(path: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the checkpoint into this empty folder, by a process of its own. ConfigError: why it cannot be."""
    root = str(Path(__file__).resolve().parents[3])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "serve.models.gguf.conversion", str(path), str(folder)]
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


def _forget_earlier(path: Path, folder: Path, cache: Path) -> None:
    for other in cache.glob("gguf-*"):
        try:
            said = json.loads((other / NOTE).read_text())["path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if other != folder and said == str(path.resolve()):
            shutil.rmtree(other, ignore_errors=True)


def _key(path: Path) -> str:
    """Another one when the file, or one of its parts, is another."""
    digest = hashlib.sha256(path.name.encode())
    stem = path.name.removesuffix(SUFFIX)
    parts = path.parent.glob(f"{PART.sub('', stem)}-*-of-*{SUFFIX}") if PART.search(stem) else [path]
    for part in sorted(parts):
        known = part.stat()
        digest.update(f"{part.resolve()} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)
