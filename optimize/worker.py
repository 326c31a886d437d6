"""One step in a process of its own: `python -m optimize.worker JOB.json FD`.

The step writes below `job.out` and reports on the file descriptor, a JSON object a line: how far it is, what it
found, or the sentence of its error. It ends with its parent.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from optimize.errors import OptimizeError
from optimize.recipe import Evaluate, Text

TASKS = {
    "merge": "optimize.merge",
    "combine": "optimize.combine",
    "prune": "optimize.prune",
    "heal": "optimize.heal",
    "quantize": "optimize.quantize",
    "onnx": "optimize.onnx",
    "genai": "optimize.genai",
    "evaluate": "optimize.evaluate",
    "engine": "optimize.engine",
    "tasks": "optimize.tasks",
}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gets: the model and adapters as they are by now, and where its own go.

    `originals` are the adapters as they fit the reference, before any step rewrote them.
    """

    kind: str
    options: dict[str, Any]
    model: str
    base: str
    reference: str
    adapters: dict[str, str]
    originals: dict[str, str]
    calibration: Text
    evaluate: Evaluate
    seed: int
    target: str
    out: str

    @property
    def folder(self) -> Path:
        return Path(self.out)


class Progress:
    """`progress(done, total, what)`; said at most five times a second, but the end always."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._said = 0.0

    def __call__(self, done: float, total: float, what: str = "") -> None:
        now = time.monotonic()
        if now - self._said > 0.2 or done >= total:
            self._said = now
            self._tell({"done": done, "total": total, "what": what})


def main(file: str, fd: str) -> int:
    _end_with_parent()
    pipe = os.fdopen(int(fd), "w", buffering=1)

    def tell(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    job = msgspec.json.decode(Path(file).read_bytes(), type=Job)
    try:
        task = importlib.import_module(TASKS[job.kind])
        notes = task.run(job, Progress(tell))
    except OptimizeError as error:
        tell({"error": error.message, "class": type(error).__name__})
        return 1
    except MemoryError:
        tell(
            {
                "error": "the step ran out of memory; close other programs, or give it a smaller model",
                "class": "OutOfMemory",
            }
        )
        return 1
    except Exception as error:
        traceback.print_exc()
        tell({"error": sentence(error), "class": "OptimizeError"})
        return 1
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tell({"notes": {**notes, "cpu_seconds": round(sum(used.ru_utime + used.ru_stime for used in spent), 1)}})
    return 0


def sentence(error: Exception) -> str:
    """What an error is to whoever must act."""
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(error):
        return "the disk is full; free some space and go on with --resume"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'loradock[optimize]' beside loradock[cpu] or loradock[gpu]"
    said = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _end_with_parent() -> None:
    """A killed run leaves no step behind that goes on computing."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's and vLLM's native modules take seconds to unload
