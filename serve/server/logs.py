"""Where the server's output goes: our own lines to the terminal, everything to a file in the data directory.

vLLM and its processes write some sixty lines a start to the standard output and error that they inherit. While a `Log`
is entered, both lead into the file; the terminal keeps a descriptor of its own.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from serve.errors import ConfigError

FORMAT, DATES = "%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S"
OURS = ("serve", "loradock")
# What these warn of is the server's own trouble.
LIBRARIES = ("uvicorn", "asyncio")
# The file and its predecessors: server.log, server.log.1 and so on.
MAX_BYTES, KEPT = 10 << 20, 3
# Seconds between two looks at the file's size, and at what is new in it when the terminal shows all.
LOOK, FOLLOW = 1.0, 0.1
# A warning that comes again word for word within so many seconds is counted, and not written.
REPEATED, REMEMBERED = 60.0, 1000
# How much of a failed start's log is shown.
ERRORS = 6

_VLLM_ERROR = re.compile(r"^(?:\([^)]*\) )?(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?(.*)")
_FRAME = re.compile(r"\s|Traceback|$|During handling|The above exception|[\^~]+$")


clock = time.monotonic


def log_to_stderr(level: str) -> None:
    """Our own loggers alone: vLLM sets its own up, and the root's would print everything twice."""
    _attach(OURS, [_handler(sys.stderr)], level.upper())


class Log:
    """`with Log(folder, level) as log`: the terminal shows our lines of `level` and above, with `debug` everything."""

    def __init__(self, folder: Path, level: str, max_bytes: int = MAX_BYTES) -> None:
        self.path = folder / "server.log"
        self._level = level
        self._max_bytes = max_bytes
        self._follows = level == "debug"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._shown = self._began = 0

    def __enter__(self) -> Log:
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            # Every writer appends: after a truncation each goes on at the new end.
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ConfigError(f"the log {self.path} cannot be written ({error.strerror}): set --data-dir") from error
        self._shown = self._began = os.fstat(file).st_size
        _flush()
        self._streams = [os.dup(1), os.dup(2)]
        self._terminal = open(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        handlers = [_handler(sys.stderr)]
        if not self._follows:
            handlers.append(_handler(self._terminal, self._level.upper()))
        # The file has our own lines from `info` up, whatever the terminal shows.
        _attach(OURS, handlers, "DEBUG" if self._follows else "INFO")
        _attach(LIBRARIES, handlers, "WARNING")
        self._thread = threading.Thread(target=self._keep, name="log", daemon=True)
        return self

    def watch(self) -> None:
        """Keep the file from growing too large, in a thread; before that, this process can be forked."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self.tidy()
        _flush()
        for descriptor, stream in enumerate(self._streams, 1):
            os.dup2(stream, descriptor)
            os.close(stream)
        log_to_stderr(self._level)
        self._terminal.close()

    def show_errors(self) -> None:
        """On the terminal, before the sentence that says why the server did not start."""
        if not self._follows:
            for line in self.errors():
                self._terminal.write(f"  {line}\n")
            self._terminal.write(f"  (all of it: {self.path})\n")

    def errors(self) -> list[str]:
        """The last errors since this start, without tracebacks; the last lines where a process ended without a word."""
        _flush()
        with self.path.open("rb") as file:
            file.seek(min(self._began, os.fstat(file.fileno()).st_size))
            lines = file.read().decode(errors="replace").splitlines()
        errors = [match[1].rstrip() for line in lines if (match := _VLLM_ERROR.match(line))]
        messages = list(dict.fromkeys(line for line in errors if not _FRAME.match(line)))
        return (messages or [line for line in lines if line.strip()])[-ERRORS:]

    def _keep(self) -> None:
        while not self._ended.wait(FOLLOW if self._follows else LOOK):
            self.tidy()
        self.tidy()

    def tidy(self) -> None:
        """Show what is new, where all is shown, and begin a new file when this one is full."""
        with self._lock, suppress(FileNotFoundError):  # somebody moved it away
            self._follow()
            if self.path.stat().st_size > self._max_bytes:
                self._rotate()

    def _follow(self) -> None:
        if not self._follows:
            return
        _flush()
        with self.path.open("rb") as file:
            file.seek(self._shown)
            self._terminal.write(file.read().decode(errors="replace"))
            self._shown = file.tell()

    def _rotate(self) -> None:
        """Copy and truncate: vLLM's processes hold the file open and know nothing of another."""
        for number in range(KEPT - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number + 1}"))
        self._follow()
        with suppress(OSError):  # a full disk: this one gives way
            shutil.copy(self.path, self.path.with_name(f"{self.path.name}.1"))
        os.truncate(self.path, 0)
        self._shown = self._began = 0


class _Handler(logging.StreamHandler[IO[str]]):
    """What goes on failing says so once a minute: on a full disk a log would take what is left of it."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        # By logger and message: when it was written, and how often it came since.
        self._written: dict[tuple[str, str], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or record.exc_info:
            return super().emit(record)
        now, message = clock(), record.getMessage()
        last, times = self._written.get((record.name, message), (-math.inf, 0))
        if now - last < REPEATED:
            self._written[record.name, message] = (last, times + 1)
            return None
        if len(self._written) >= REMEMBERED:
            del self._written[next(iter(self._written))]
        self._written[record.name, message] = (now, 0)
        if times:
            message += f" (and {times:,} times since it was last written)"
        return super().emit(logging.makeLogRecord({**vars(record), "msg": message, "args": ()}))


def _handler(stream: IO[str], level: str = "NOTSET") -> logging.Handler:
    handler = _Handler(stream)
    handler.setFormatter(logging.Formatter(FORMAT, DATES))
    handler.setLevel(level)
    return handler


def _attach(names: Iterable[str], handlers: list[logging.Handler], level: str) -> None:
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = list(handlers), False
        logger.setLevel(level)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
