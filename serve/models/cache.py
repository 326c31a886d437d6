"""Folders that are made once and kept in the cache: one maker at a time, whole or absent, errors in sentences."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serve.errors import ConfigError


def default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock"


def check_room(cache: Path, nbytes: int) -> None:
    """OSError (no space) if that many bytes are not free there."""
    if shutil.disk_usage(cache).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """One maker at a time, across processes; the kernel lets go of the lock when its holder dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whatever a killed maker left: under the lock, nobody can be using it.
        for leftover in cache.glob(f".{name}-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def aside(cache: Path, name: str) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".part", dir=cache))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def sentences(name: str, cache: Path, nbytes: int) -> Iterator[None]:
    """Errors of the disk as ConfigErrors. nbytes: what making `name` takes for a moment."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"no room for {name} in {cache}: making it takes {nbytes >> 20} MB for a moment; "
                "free some, or set LORADOCK_CACHE_DIR to a larger disk"
            ) from problem
        raise ConfigError(
            f"{name} cannot be kept in {cache}: {problem.strerror or problem}; "
            "set LORADOCK_CACHE_DIR to a folder that can be written"
        ) from problem


def readable(folder: Path) -> None:
    """By other accounts of this machine too: the cache may be a shared one."""
    for file in folder.iterdir():
        file.chmod(0o644)
