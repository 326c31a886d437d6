"""A program of ours beside the module that runs it, in a process group of its own: all that it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def running(program: Path, python: str = sys.executable, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program, with pipes to its input and from its output; `options` are Popen's. It ends with the block."""
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [python, "-P", str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with suppress(BrokenPipeError):  # it ended before it had read everything
                    pipe.close()
