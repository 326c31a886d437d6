"""The processes of an engine: who they are, what they take, and why one ended."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.vllm_backend import forkserver

log = logging.getLogger(__name__)

# A worker of a tensor-parallel engine outlives the process that started it by as long as it takes to notice, and what
# it holds of a GPU is free only when the kernel is done with it.
END_SECONDS, END_POLL = 30.0, 0.02


def processes_of(llm: Any) -> list[Any]:
    """The engine's own processes; none where Ray holds them."""
    manager = llm.engine_core.resources.engine_manager
    return list(getattr(manager, "processes", []))


def resident_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def private_bytes(pid: int) -> int:
    """Of its memory what it shares with no other process; 0 where the kernel does not say."""
    with suppress(OSError):
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(row.split()[1]) << 10 for row in rows if row.startswith("Private_"))
    return 0


def cause_of_death(processes: Iterable[Any]) -> str:
    """Why the first of them that failed ended."""
    codes = [process.exitcode for process in processes if process.exitcode]
    if not codes:
        return "it stopped after an error: the log says which"
    if codes[0] == -signal.SIGKILL:
        return "its process was killed (SIGKILL; the kernel does that when memory is short)"
    if codes[0] < 0:
        return f"its process ended by {signal.Signals(-codes[0]).name}"
    if codes[0] == forkserver.UNKNOWN:
        return "its process ended: the log says why, unless it was killed, as the kernel does when memory is short"
    return f"its process ended with code {codes[0]}: the log says why"


@dataclass(frozen=True, slots=True)
class Member:
    """One of an engine's processes; `born` tells it from a later one of the same id."""

    pid: int
    born: str

    @property
    def alive(self) -> bool:
        """It, or a thread of it, still holds its memory."""
        return _born(self.pid) == self.born


def members(pids: Iterable[int]) -> frozenset[Member]:
    return frozenset(Member(pid, born) for pid in pids if (born := _born(pid)))


def end(engine: Collection[Member], seconds: float = END_SECONDS) -> None:
    """Kill what is left of an engine's processes, and return when all of them are gone."""
    for member in engine:
        if member.alive:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
    until = time.monotonic() + seconds
    while left := [member.pid for member in engine if member.alive]:
        if time.monotonic() > until:
            log.error("processes %s of an engine were killed and are still there; they may hold its memory", left)
            return
        time.sleep(END_POLL)


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks; nothing once all of its threads have ended."""
    with suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1:
            return rest[18]
    return ""
