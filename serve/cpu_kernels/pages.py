"""Memory that is given back to the kernel, page by page, while what lies there keeps its address; and tables in files.

A checkpoint's files are mapped while they are read: their pages count as this process's until they are dropped. A table
of which a step reads a few rows, as a large embedding, lies in a file of its own that has no name: the pages that are
read stay in memory as long as there is room. In the checkpoint's own file it would change, or be cut off, with it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("loradock")

LARGE = 256 << 20  # bytes of a table that is put into a file
SPARE = 1 << 30  # bytes that the disk has left afterwards


def drop(tensor: torch.Tensor) -> None:
    """Give back the pages within a contiguous tensor. Memory of its own reads as zeros then; a file is read again."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _advise()(first, last - first, mmap.MADV_DONTNEED)


@cache
def _advise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def release() -> None:
    """Have the allocator give back what is freed: it would keep it for later."""
    _release()()


@cache
def _release() -> Callable[[], object]:
    process = ctypes.CDLL(None)
    for name, arguments in (("MallocExtension_ReleaseFreeMemory", ()), ("malloc_trim", (0,))):
        if (function := getattr(process, name, None)) is not None:
            return lambda function=function, arguments=arguments: function(*arguments)  # type: ignore[misc]
    return lambda: None


def read_once(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's weights, each of which is dropped when the next one is asked for, where its file is mapped."""
    files: list[range] = []
    for name, tensor in weights:
        yield name, tensor
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            continue
        if not any(tensor.data_ptr() in file for file in files):
            files = _mapped_files()
        if any(tensor.data_ptr() in file for file in files):
            drop(tensor)


def _mapped_files() -> list[range]:
    """Addresses at which files are, whatever they are called: a hub's cache links to blobs."""
    with suppress(OSError):
        # Addresses, permissions, offset, device, inode, path.
        entries = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [entry[0].split("-") for entry in entries if entry[4] != "0"]
        return [range(int(begin, 16), int(end, 16)) for begin, end in ends]
    return []


def in_file(table: torch.Tensor, folder: Path) -> torch.Tensor | None:
    """The same numbers in an unnamed file in this folder; None where there is no room for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
        if disk.f_bavail * disk.f_frsize < table.nbytes + SPARE:
            raise OSError("the disk is nearly full")
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            left = memoryview(table.detach().contiguous().view(torch.uint8).flatten().numpy())
            while left:
                left = left[os.write(file, left[: 64 << 20]) :]
            mapped = mmap.mmap(file, table.nbytes, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(file)
    except OSError as error:
        log.info(
            "an embedding of %d MB stays in memory, and not in a file in %s: %s", table.nbytes >> 20, folder, error
        )
        return None
    return torch.frombuffer(mapped, dtype=torch.uint8).view(table.dtype).view(table.shape)


def keep_in_file(parameter: Any, folder: Path) -> None:
    """Have a large table put into a file when it is loaded."""
    load = getattr(parameter, "weight_loader", None)
    if load is None or parameter.nbytes < LARGE:
        return

    def into_file(parameter: Any, read: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        fits = read.shape == parameter.shape and read.dtype == parameter.dtype
        table = in_file(read, folder) if fits else None
        if table is None:
            load(parameter, read, *args, **kwargs)
        else:
            parameter.data, parameter.loradock_in_file = table, True

    parameter.weight_loader = into_file


def leave(parameter: Any) -> None:
    """Keep nothing of a table in memory that is in a file, after all of it was read once."""
    if getattr(parameter, "loradock_in_file", False):
        drop(parameter.data)
