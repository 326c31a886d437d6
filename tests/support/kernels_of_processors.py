"""`tests.support.kernel_results` for several processors, each in a process that is forked where the imports are done.

    python -m tests.support.kernels_of_processors haswell=older.pt native=mine.pt

On stdout is how each ended: its exit code, or the signal's number below zero, and its name.
"""

from __future__ import annotations

import os
import sys
import traceback

import torch  # noqa: F401  what takes seconds, and nothing that loads kernels
import vllm.lora.layers
import vllm.model_executor.models.llama  # noqa: F401

from serve.cpu_kernels import build


def forked(march: str, file: str) -> int:
    """How the process ended that computes what is compiled for this processor."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.environ[build.MARCH] = march
        from tests.support import kernel_results

        kernel_results.main(file)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(*pairs: str) -> None:
    assert not build.library.cache_info().currsize, "an import has loaded the kernels"
    for march, file in (pair.split("=") for pair in pairs):
        print(forked(march, file), march, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
