"""A process that has imported what steps need, for all steps of a run: each is a fork of it.

`python -m optimize.pipeline.resident FD` is that process; the descriptor is a socket, by which it gets a step's job,
the pipe to report on, its log and the process group that it belongs to, and gives the step's number and how it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from optimize import audio_packages
from optimize.errors import OptimizeError
from optimize.pipeline import worker
from optimize.processes import ProcessGroup

PR_SET_PDEATHSIG = 1
MESSAGE = 1 << 16
# transformers finds a class when it is asked for it, and imports a great deal then.
IMPORTED = (
    "transformers:AutoConfig",
    "transformers:AutoTokenizer",
    "transformers:AutoModelForCausalLM",
    "transformers:GenerationConfig",
    "transformers:LlamaForCausalLM",
    "transformers:PreTrainedTokenizerFast",
    "accelerate:init_empty_weights",
    "optimize.evaluation.evaluate:run",
    "optimize.steps.calibrated:CalibratedModel",
)


class Socket:
    """The way to the resident. A fork of it may hold the other end for a moment, so its process is looked at too."""

    def __init__(self, here: socket.socket, process: int) -> None:
        self.here, self.process = here, process

    def receive(self) -> bytes:
        """Its next message; nothing if it has ended."""
        here = self.here.fileno()
        ready, _, _ = select.select([here, self.process], [], [])
        return self.here.recv(MESSAGE) if here in ready else b""


class Forked:
    """A step's process, as subprocess describes one: it is not a child of this process."""

    def __init__(self, pid: int, resident: Socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._resident = resident

    def wait(self) -> int:
        if self.returncode is None:
            message = self._resident.receive()
            if not message:  # the resident was killed, maybe before this process was told to end with it
                self.kill()
            self.returncode = json.loads(message)["returncode"] if message else -signal.SIGKILL
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Resident:
    """Starts the process with the first step, and ends it when this is closed."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._socket: Socket | None = None
        self._last: Forked | None = None

    def start(self, job: Path, pipe: int, log: int, group: int, environ: Mapping[str, str], model: str = "") -> Forked:
        """A process of its own for the job in a file, in a process group; it finds the tokenizer of `model` open."""
        order = json.dumps({"job": str(job), "group": group, "model": model}).encode()
        for _ in range(2):  # somebody may have killed the resident since the last step
            if self._last is not None:
                self._last.wait()
            if self._socket is None:
                self._socket = self._started(environ, log)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._socket.here, [order], [pipe, log])
                if message := self._socket.receive():
                    self._last = Forked(json.loads(message)["pid"], self._socket)
                    return self._last
            self.close()
        raise OptimizeError("the process that steps are forked from was killed, twice: is there memory enough for it?")

    def close(self) -> None:
        self._open.close()
        self._socket = self._last = None

    def _started(self, environ: Mapping[str, str], log: int) -> Socket:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        group = self._open.enter_context(ProcessGroup())
        self._open.callback(here.close)
        with there:
            process = group.start(
                [sys.executable, "-m", "optimize.pipeline.resident", str(there.fileno())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, pass_fds=[there.fileno()],
            )  # fmt: skip
        descriptor = os.pidfd_open(process.pid)
        self._open.callback(os.close, descriptor)
        return Socket(here, descriptor)


def main(fd: str) -> int:
    audio_packages.hide()
    for name in IMPORTED:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(Exception):  # whoever needs it says what is wrong
            getattr(importlib.import_module(module), attribute)
    gc.freeze()
    with socket.socket(fileno=int(fd)) as asks:
        while True:
            message, descriptors, *_ = socket.recv_fds(asks, MESSAGE, 2)
            if not message:
                return 0
            order = json.loads(message)
            with contextlib.suppress(Exception):  # the step says what is wrong
                _open_tokenizer(order["model"])
            pid = os.fork()
            if not pid:
                asks.close()
                _step(order["job"], *descriptors)
            try:
                os.setpgid(pid, order["group"])
            except OSError:  # the group has ended meanwhile
                os.kill(pid, signal.SIGKILL)
            for descriptor in descriptors:
                os.close(descriptor)
            asks.send(json.dumps({"pid": pid}).encode())
            _, status = os.waitpid(pid, 0)
            asks.send(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}).encode())


def _open_tokenizer(model: str) -> None:
    """Every step over a model reads text by it."""
    from optimize.checkpoint.model import tokenizer

    if model:
        tokenizer(Path(model))


def _step(job: str, pipe: int, log: int) -> None:
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = worker.main(job, str(pipe))
    finally:
        worker.leave(code)


if __name__ == "__main__":
    worker.leave(main(sys.argv[1]))
