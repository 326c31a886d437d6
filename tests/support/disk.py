"""What is on disk while a server writes to it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def contents(folder: Path) -> list[bytes]:
    """Of the files under it, whichever come and go meanwhile."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found.append(Path(place, name).read_bytes())
    return found


def nbytes(folder: Path) -> int:
    return sum(map(len, contents(folder)))
