"""One run at a time makes an output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from optimize.errors import Refused


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The lock on making `out`; Refused while another run holds it. The file is gone afterwards."""
    path = out.with_name(f".{out.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"another run is making {out}; wait for it, or name another place with --out") from None
            # A run that ends removes the file. Who opened it before and locks it now holds what nobody else looks at.
            if not _is(file, path):
                continue
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)


def _is(file: TextIO, path: Path) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
