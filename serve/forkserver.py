"""vLLM's processes forked from one that has imported vLLM already, so that they need not do so one after the other.

Imports take most of a start on a CPU: six seconds in the server, in the engine and in the worker. `start` lets one
process import vLLM while the server does, on another core; the engine and its worker are then forked from that one, in
milliseconds. It has one thread and has computed nothing, so forking it is sound. `install` runs in vLLM's processes.

It also waits for what it forked. There a Linux 6.18 guest was seen to keep it in the kernel for minutes, after an
engine of 2 GB had ended while another one computed; `renew` begins with a fresh one then.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

log = logging.getLogger("loradock")

VARIABLE = "LORADOCK_FORKSERVER"
PRELOAD = "serve.preload"
IMPORTS = 60.0  # seconds after its start in which it may be busy with nothing but imports
STUCK = 1.0  # seconds without a pause, after which it counts as stuck

_begun = 0.0


def start() -> None:
    """Begin to import vLLM in a process aside. What LD_PRELOAD holds now is what vLLM's processes will have."""
    if "omp" not in os.environ.get("LD_PRELOAD", ""):
        return  # vLLM finds an OpenMP itself, later, and preloads it by executing its processes anew
    os.environ[VARIABLE] = "1"
    multiprocessing.set_forkserver_preload([PRELOAD])
    _begin()


def _begin() -> None:
    global _begun
    _begun = time.monotonic()
    forkserver.ensure_running()


def renew() -> bool:
    """Begin with a fresh process if the old one is stuck; that one stays as long as what it forked."""
    server: Any = forkserver._forkserver
    if os.environ.get(VARIABLE) != "1" or time.monotonic() - _begun < IMPORTS or server._forkserver_pid is None:
        return False
    seen = time.monotonic()
    while _runs(server._forkserver_pid):
        if time.monotonic() - seen > STUCK:
            break
        time.sleep(0.02)
    else:
        return False
    log.warning(
        "process %d, which engines are forked from, is stuck: the next come from another", server._forkserver_pid
    )
    with server._lock:
        os.close(server._forkserver_alive_fd)
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    _begin()
    return True


def _runs(pid: int) -> bool:
    """It has something to do, in its own code or in the kernel's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


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


class Process(ForkServerProcess):
    """A process with the environment that its creator has when it starts it, as after fork or spawn."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _born, (type(self), dict(os.environ)), self.__dict__


class Context(ForkServerContext):
    Process = Process


def _born(kind: type[Process], environ: Mapping[str, str]) -> Process:
    # The first thing that is unpickled in the new process.
    os.environ.clear()
    os.environ.update(environ)
    gc.freeze()  # what it was forked with stays, in memory that it shares
    return kind.__new__(kind)
