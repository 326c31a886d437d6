"""vLLM's processes forked from one that has imported vLLM already, so that they need not do so one after the other.

Imports take most of a start on a CPU: six seconds in the server, in the engine and in the worker. `start` lets one
process import vLLM while the server does, on another core; the engine and its worker are then forked from that one, in
milliseconds. It has one thread and has computed nothing, so forking it is sound. `install` runs in vLLM's processes.

All of them end with the server, by the kernel's hand: a process that is stuck, or holds Python's lock for long, hears
nothing of it otherwise. `follow` is for what was started in another way.

It also waits for what it forked. There a Linux 6.18 guest was seen to keep it in the kernel for minutes, after an
engine of 2 GB had ended while another one computed; so in that case the next engine comes from a fresh one: `leave`.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

VARIABLE = "LORADOCK_FORKSERVER"
PRELOAD = "serve.vllm_backend.preload"
UNKNOWN = 255  # multiprocessing's, where nobody is left to tell
PR_SET_PDEATHSIG = 1


def start() -> None:
    """Begin to import vLLM in a process aside. What LD_PRELOAD holds now is what vLLM's processes will have."""
    if "omp" not in os.environ.get("LD_PRELOAD", ""):
        return  # vLLM finds an OpenMP itself, later, and preloads it by executing its processes anew
    os.environ[VARIABLE] = "1"
    multiprocessing.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def ensure() -> None:
    """Have it running, if it is wanted: it ends with the thread that starts it, so that must be one that stays."""
    if os.environ.get(VARIABLE) == "1":
        forkserver.ensure_running()


def leave() -> None:
    """Begin with a fresh one; the old one ends with the last that it forked, whose exit code is `UNKNOWN` then."""
    server: Any = forkserver._forkserver
    with server._lock:
        if (left := server._forkserver_pid) is None:
            return
        os.close(server._forkserver_alive_fd)
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    threading.Thread(target=os.waitpid, args=(left, 0), daemon=True, name="left-forkserver").start()
    forkserver.ensure_running()


def install() -> None:
    """Let vLLM start processes from there, if there is one."""
    if os.environ.get(VARIABLE) != "1":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and "get_mp_context" in vars(module):
            vars(module)["get_mp_context"] = Context


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that forked it: SIGKILL, which nothing can be too stuck for."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def follow(sentinel: int, leave: Callable[[int], object] = os._exit) -> None:
    """End with the parent: a server that was killed leaves no engine behind that holds its memory.

    `sentinel` is the pipe through which this process was told what to do, and may still hold some of it; its other end
    closes with the parent, who need not be the one whom the kernel names.
    """
    closed = select.poll()
    closed.register(sentinel, 0)
    closed.poll()
    leave(1)


class Process(ForkServerProcess):
    """A process with the environment that its creator has when it starts it, as after fork or spawn."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _born, (type(self), dict(os.environ)), self.__dict__


class Context(ForkServerContext):
    Process = Process


def _born(kind: type[Process], environ: Mapping[str, str]) -> Process:
    # The first thing that is unpickled in the new process. The fork server has one thread, and ends with the server.
    die_with_parent()
    os.environ.clear()
    os.environ.update(environ)
    gc.freeze()  # what it was forked with stays, in memory that it shares
    return kind.__new__(kind)
