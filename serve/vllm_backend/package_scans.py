"""What transformers finds out whenever it is imported, kept in a file: nearly a second of a server's start.

It reads the source of all of its models, twice, for the names that they define, and the list of files of every
installed package. Both are asked for again when a file is another one by its size or its time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import marshal
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from serve import files
from serve.cpu_kernels.build import cache_folder
from serve.vllm_backend import import_hooks

# Which this replaces, if it is there.
SCAN = "create_import_structure_from_path"
KEY_BYTES = hashlib.sha256().digest_size


def install() -> None:
    """Have transformers take what is kept, when it is imported."""
    import_hooks.around("transformers.utils.import_utils", _kept_scans)


@contextmanager
def _kept_scans(module: ModuleType) -> Iterator[None]:
    scan = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: kept("packages", _metadata(), lambda: dict(scan()))
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = scan
    if (structure := vars(module).get(SCAN)) is not None:
        setattr(module, SCAN, _of_models(structure, Path(module.__file__ or "").parents[1] / "models"))


def _of_models(scan: Callable[[Any], Any], models: Path) -> Callable[[Any], Any]:
    """`scan`, which takes a folder or a file in it, with what is kept for the folder of all models."""

    def scanned(path: Any) -> Any:
        if Path(path) not in (models, models / "__init__.py"):
            return scan(path)
        return kept("models", _sources(models), lambda: scan(path))

    return scanned


def kept(name: str, inputs: list[tuple[str, int, int]], compute: Callable[[], Any]) -> Any:
    """What `compute` returned for the same inputs, or returns now. Where nothing can be kept it is always computed."""
    key = hashlib.sha256(repr((sys.version, inputs)).encode()).digest()
    folder = cache_folder().with_name("imports")
    with suppress(OSError, EOFError, ValueError, TypeError):
        content = (folder / name).read_bytes()
        if content[:KEY_BYTES] == key:
            return marshal.loads(content[KEY_BYTES:])
    value = compute()
    with suppress(OSError, ValueError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_whole(folder / name, key + marshal.dumps(value))
    return value


def _sources(folder: Path) -> list[tuple[str, int, int]]:
    """Every source file below a folder, with its time and size."""
    return sorted(
        (entry.path, status.st_mtime_ns, status.st_size)
        for entry in _entries(folder)
        if entry.name.endswith(".py") and (status := entry.stat())
    )


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != "__pycache__":
                yield from _entries(entry.path)


def _metadata() -> list[tuple[str, int, int]]:
    """What tells which packages are installed: the folders that are searched, and those of metadata in them."""
    found = []
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")):
                    status = entry.stat()
                    found.append((entry.path, status.st_mtime_ns, status.st_size))
    return sorted(found)
