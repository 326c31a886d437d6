"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

# The kernel closes the pipe when its holder is gone, after SIGKILL too; then the shell ends its whole process group.
WATCH = "trap '' HUP INT TERM; read _; kill -9 0"


class ProcessGroup:
    """Processes that are killed, with all that they start, when this is closed or this process is gone."""

    def __init__(self) -> None:
        # The first of the group, so that no process of it is ever without the watch.
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", WATCH],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._watch.pid, signal.SIGKILL)
        for process in (*self._started, self._watch):
            process.wait()
        assert self._watch.stdin is not None
        self._watch.stdin.close()

    @property
    def number(self) -> int:
        return self._watch.pid

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        process: subprocess.Popen[Any] = subprocess.Popen(command, process_group=self.number, **options)
        self._started.append(process)
        return process
