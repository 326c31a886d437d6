"""The processes of an engine: who they are, what they take, and why one ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from serve.vllm_backend import forkserver


def processes_of(llm: AsyncLLM) -> list[Any]:
    """The engine's own processes; none where Ray holds them."""
    manager = llm.engine_core.resources.engine_manager
    return list(getattr(manager, "processes", []))


def resident_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
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
