"""The program that trains, at the lowest priority over a job's folder: suspended under load, ended with the server.

    COMMAND tune FOLDER                                 trains, or goes on; SIGTERM saves and stops
    COMMAND check FILE --method M --fewest N --json     says what is wrong with examples
    COMMAND validate FOLDER --model M --json            says what an adapter did to its base

It is `optimize`'s own command line: the two packages do not import one another.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

import serve
from serve.errors import LoradockError
from serve.jobs.finetuning import lowest_priority, process_tree
from serve.models import hardware
from serve.rollout import validation
from serve.rollout.validation import Report

LOOK_SECONDS = 0.1
# After the load is gone the training goes on once it was gone for so long.
QUIET_SECONDS = 1.0
# What SIGTERM leaves it to save a checkpoint; a stop of the server waits no longer either.
SAVE_SECONDS = 10.0
CHECK_SECONDS, VALIDATION_SECONDS = 600.0, 3600.0
COMMAND = (sys.executable, "-m", "optimize.cli")
# Variables that are not handed on, by how they begin.
_KEPT_BACK = ("LORADOCK_", "VLLM_", "OMP_", "KMP_", "LD_PRELOAD")


# What training imports beside torch, which an engine brings: part of the extras `cpu` and `gpu`.
PACKAGES = ("peft",)


class CannotCheck(LoradockError):
    """The program that checks examples does not work here."""


class Why(StrEnum):
    """Why the program is not running any more."""

    ENDED = "ended"
    STOPPED = "stopped"  # it was told to
    HUNG = "hung"  # no step for too long
    OVERTIME = "overtime"


@dataclass(frozen=True, slots=True)
class Ended:
    """`code` is its exit code, negative for a signal."""

    why: Why
    code: int


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with a file of examples; without a line, with all of it."""

    message: str
    line: int | None = None

    @property
    def sentence(self) -> str:
        return self.message if self.line is None else f"Line {self.line}: {self.message}"


class Checked(msgspec.Struct, frozen=True):
    """What `check` says of a file."""

    examples: int
    problems: list[Problem] = []
    problem_count: int = 0
    message: str = ""


class TrainingProcess:
    """`is_busy` says that clients need the machine: it is asked again and again, from another thread than the server's.

    `stall` is how long a training may run without a sign of life, in seconds that it was not suspended.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool] = lambda: False,
        *,
        command: Sequence[str] = COMMAND,
        nice: int = lowest_priority.LOWEST,
        stall: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_busy = is_busy
        self.stall = stall
        self._clock = clock
        self.command, self.nice = tuple(command), nice
        self.pid: int | None = None
        self.suspended = False

    def missing_package(self) -> str:
        """What training needs and this environment lacks; "" where nothing is missing."""
        return next((package for package in PACKAGES if importlib.util.find_spec(package) is None), "")

    def check(self, file: Path, method: str, fewest: int, model: Path, stop: threading.Event) -> Checked | None:
        """What is wrong with a file of examples, which must have so many and be read by `model`; None once `stop` is
        set. Blocks."""
        command = [*self.command, "check", str(file), "--method", method, "--fewest", str(fewest), "--json"]
        command += ["--model", str(model)]
        said = self._answered(command, stop)
        if said is None:
            return None
        try:
            return msgspec.json.decode(said[0], type=Checked)
        except msgspec.DecodeError as error:
            raise CannotCheck(f"the examples cannot be checked (exit code {said[2]}): {_last_line(said[1])}") from error

    def _answered(
        self, command: Sequence[str], stop: threading.Event, seconds: float | None = None
    ) -> tuple[bytes, bytes, int] | None:
        """What a program wrote until its end, and its exit code; None once `stop` is set."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # Its group is its own, so that Ctrl+C at the server's terminal is the server's alone.
        with hardware.every_core():
            started = subprocess.Popen(self._behind(command), **pipes, env=_environ(), process_group=0)
        with started as process:
            try:
                said = self._said(process, stop, CHECK_SECONDS if seconds is None else seconds)
            finally:
                process.kill()
        return None if said is None else (*said, process.returncode)

    def validate(
        self,
        adapter: Path,
        model: Path,
        files: Mapping[str, Path],
        stop: threading.Event,
    ) -> Report | None:
        """What an adapter did to its base; `files` are the examples that it was trained on (`train`), and held-out ones
        (`validation`). None once `stop` is set. Blocks."""
        command = [*self.command, "validate", str(adapter), "--model", str(model), "--json"]
        for name, file in files.items():
            command += [f"--{name}", str(file)]
        said = self._answered(command, stop, VALIDATION_SECONDS)
        if said is None:
            return None
        if (report := validation.read(said[0])) is None:
            raise CannotCheck(f"the adapter cannot be validated: {_last_line(said[1])}")
        return report

    def _said(
        self, process: subprocess.Popen[bytes], stop: threading.Event, seconds: float
    ) -> tuple[bytes, bytes] | None:
        """What it wrote until its end; seconds in which clients need the machine do not count."""
        left = seconds
        while not stop.is_set():
            try:
                return process.communicate(timeout=LOOK_SECONDS)
            except subprocess.TimeoutExpired as slow:
                left -= 0.0 if self.is_busy() else LOOK_SECONDS
                if left < 0:
                    raise CannotCheck(f"it took longer than {seconds:g} s: send fewer examples") from slow
        return None

    def run(
        self, folder: Path, stop: threading.Event, look: Callable[[float], bool], seconds: float = float("inf")
    ) -> Ended:
        """Train until the program ends, `stop` is set, or it ran for `seconds`. Blocks, on a thread that outlives it.

        `look(ran)` is called again and again, with the seconds that it ran since the last time, and answers whether
        there was a sign of life.
        """
        with (folder / "log").open("ab") as output, hardware.every_core():
            process = subprocess.Popen(
                self._behind([*self.command, "tune", str(folder)]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=_environ(),
                # Its session stays the server's: with one of its own the kernel may give it as much as everybody else.
                process_group=0,
            )
        self.pid = process.pid
        try:
            return self._watched(process, stop, look, seconds)
        finally:
            if process.poll() is None:
                process_tree.send(process.pid, signal.SIGKILL)
                process.wait()
            self.pid, self.suspended = None, False

    def _watched(
        self, process: subprocess.Popen[bytes], stop: threading.Event, look: Callable[[float], bool], seconds: float
    ) -> Ended:
        last = quiet_since = self._clock()
        ran = silent = 0.0
        while process.poll() is None:
            if stop.wait(LOOK_SECONDS):
                return self._stopped(process)
            now = self._clock()
            passed, last = now - last, now
            if self.is_busy():
                quiet_since = now + QUIET_SECONDS
            self._suspend(process.pid, now < quiet_since)
            if self.suspended:
                continue
            ran, silent = ran + passed, silent + passed
            if look(passed):
                silent = 0.0
            if silent > self.stall:
                return Ended(Why.HUNG, -signal.SIGKILL)
            if ran > seconds:
                return Ended(Why.OVERTIME, -signal.SIGKILL)
        look(0.0)
        return Ended(Why.ENDED, process.returncode)

    def _suspend(self, pid: int, wanted: bool) -> None:
        if wanted != self.suspended:
            process_tree.send(pid, signal.SIGSTOP if wanted else signal.SIGCONT)
            self.suspended = wanted

    def _stopped(self, process: subprocess.Popen[bytes]) -> Ended:
        """It may save a checkpoint, and no more."""
        process.terminate()
        self._suspend(process.pid, False)
        try:
            process.wait(SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process_tree.send(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(Why.STOPPED, process.returncode)

    def _behind(self, command: Sequence[str]) -> list[str]:
        return [sys.executable, "-S", "-E", lowest_priority.__file__, str(os.getpid()), str(self.nice), *command]


def _last_line(output: bytes) -> str:
    return "".join(output.decode("utf-8", "replace").strip().splitlines()[-1:])


def _environ() -> Mapping[str, str]:
    """As the server's, without its keys and what its engines were told; the packages are where the server's own are."""
    root = str(Path(serve.__file__).resolve().parent.parent)
    left = {name: value for name, value in os.environ.items() if not name.startswith(_KEPT_BACK)}
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**left, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
