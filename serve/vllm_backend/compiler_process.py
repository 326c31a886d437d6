"""A process that compiles what it is sent, and is ended when that takes too long.

It imports nothing of vLLM's before it has to.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

from serve.vllm_backend import forkserver


class CompilerProcess:
    """Whoever waits for its answer learns of its end by the pipe."""

    def __init__(self, compiler: Callable[..., None], *arguments: Any) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context: Any = forkserver.Context() if forkserver.wanted() else multiprocessing.get_context("spawn")
        self.process = context.Process(target=_run, args=(theirs, compiler, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self, seconds: float) -> None:
        with suppress(EOFError, OSError):
            if self._connection.poll(seconds):
                self._connection.recv()
                return
        self._end()
        raise RuntimeError("the process that compiles structured outputs does not start")

    def compile(self, outputs: Any, seconds: float) -> Any:
        try:
            self._connection.send(outputs)
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return "the structured output cannot be compiled: the process that did so ended"
        self._end()
        return (
            f"the structured output takes longer than {seconds:g} s to compile; simplify it: fewer alternatives, less"
            " nesting, no large repetitions"
        )

    def _end(self) -> None:
        self.process.kill()
        self.process.join(1)
        self._connection.close()


def _run(connection: Connection, compiler: Callable[..., None], *arguments: Any) -> None:
    """In the process: it ends with its parent, leaves Ctrl-C to it, and begins nothing on a GPU.

    Some compilers ask torch whether there is one, for memory that is copied faster: half a gigabyte is gone then.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=forkserver.follow, args=(parent.sentinel,), daemon=True, name="follow-parent").start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setproctitle.setproctitle("loradock: grammar compiler")
    compiler(connection, *arguments)
