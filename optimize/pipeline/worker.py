"""One step in a process of its own: `python -m optimize.pipeline.worker JOB.json FD`.

The step writes below `job.out` and reports on the file descriptor, a JSON object a line: its progress, its notes, or
its error.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from optimize import audio_packages
from optimize.errors import UNREAD, OptimizeError
from optimize.job import Job, Progress
from optimize.steps.kind import kinds

# What a recipe's steps follow, and what follows them.
TASKS = {
    "probe": "optimize.pipeline.probe",
    "onnx": "optimize.export.onnx",
    "genai": "optimize.export.genai",
    "gguf": "optimize.export.gguf_file",
    "evaluate": "optimize.evaluation.evaluate",
    "engine": "optimize.evaluation.engine",
    "tasks": "optimize.evaluation.tasks",
}


def work(kind: str) -> str:
    """The module with `run(job, progress)` of a step, or of what follows the steps."""
    return TASKS.get(kind) or kinds()[kind].work


def main(file: str, fd: str) -> int:
    pipe = os.fdopen(int(fd), "w", buffering=1)

    def tell(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    audio_packages.hide()
    job = msgspec.json.decode(Path(file).read_bytes(), type=Job)
    try:
        task = importlib.import_module(work(job.kind))
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
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            traceback.print_exc()
        tell({"error": sentence(error), "class": "OptimizeError"})
        return 1
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tell({"notes": {**notes, "cpu_seconds": round(sum(used.ru_utime + used.ru_stime for used in spent), 1)}})
    return 0


def sentence(error: Exception) -> str:
    """The error as a message that says what to do."""
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(error):
        return "the disk is full; free some space and go on with --resume"
    if isinstance(error, BrokenPipeError):
        return UNREAD
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return "the GPU's memory is full: end what else computes there, or say `device: cpu`, and go on with --resume"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'loradock[optimize]' beside loradock[cpu] or loradock[gpu]"
    message = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def leave(code: int) -> NoReturn:
    """Torch's and vLLM's native modules take seconds to unload."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1], sys.argv[2]))
