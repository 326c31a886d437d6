"""Where a server and all of its processes keep what is temporary: sockets of vLLM and of multiprocessing, and the like.

They leave much of it behind: engines end by the kernel's hand. It goes with the server, and what a server that was
killed has left goes at the next start over the same data directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

# Behind it comes a name of up to 38 characters; the kernel takes 107 for the path of a socket.
LONGEST = 107 - 38


@contextmanager
def temporary_folder(data_dir: Path) -> Iterator[None]:
    """For this process and those that it starts; `data_dir` is this server's alone."""
    before, mark = os.environ.get("TMPDIR"), sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"loradock-{os.getuid()}-{mark}"
    if len(os.fsencode(folder)) > LONGEST:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError:  # another account's, or there is no room
        yield
        return
    _use(str(folder))
    try:
        yield
    finally:
        _use(before)
        shutil.rmtree(folder, ignore_errors=True)


def _use(folder: str | None) -> None:
    if folder is None:
        os.environ.pop("TMPDIR", None)
    else:
        os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # what Python had found
