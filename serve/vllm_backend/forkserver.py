"""vLLM's processes forked from one that has imported vLLM already, so that they need not do so one after the other.

Imports take most of a start on a CPU, and half a gigabyte, in the server, in the engine and in the worker. `start`
imports vLLM and forks this process into a second one, from which the engine and its worker are then forked, in
milliseconds: what was imported is in memory once for all of them. A server that runs over other libraries than they
preload cannot be forked; there the second process imports for itself, on another core. Either has one thread and has
computed nothing, so forking it is sound. `install` runs in vLLM's processes.

All of them end with the server, by the kernel's hand: a process that is stuck, or holds Python's lock for long, hears
nothing of it otherwise. `follow` is for what was started in another way.

It also waits for what it forked. There a Linux 6.18 guest was seen to keep it in the kernel for minutes, after an
engine of 2 GB had ended while another one computed; so in that case the next engine comes from a fresh one: `leave`.
The other one may be another server's: one that does not fork within `ANSWER_SECONDS` is left too.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing import context, forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.connection import arbitrary_address, wait  # type: ignore[attr-defined]
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.util import is_abstract_socket_namespace
from pathlib import Path
from typing import Any, NoReturn

import setproctitle

from serve.models import hardware

VARIABLE = "LORADOCK_FORKSERVER"
PROCESS, PRELOAD = "serve.vllm_backend.forkserver_process", "serve.vllm_backend.preload"
PREPARED = "serve.vllm_backend.prepared"
# Of the server's (serve/server/logs.py): their handlers write where it alone writes.
LOGGERS = ("serve", "loradock", "uvicorn", "asyncio")
# A fork takes milliseconds; the first one waits for all that the fork server imports.
ANSWER_SECONDS = 30.0
UNKNOWN = 255  # multiprocessing's, where nobody is left to tell
PR_SET_PDEATHSIG = 1

log = logging.getLogger("loradock")


def start(models: Iterable[tuple[str, Mapping[str, Any]]] = (), imported: Callable[[], object] = lambda: None) -> None:
    """Have a process with vLLM imported, and the tokenizers of these models (with their engines' options) read.

    What LD_PRELOAD holds now is what vLLM's processes will have. `imported` imports what this process needs beside
    vLLM, if it is the one that is forked: afterwards it would have copies made of much that it shares.
    """
    if "omp" not in os.environ.get("LD_PRELOAD", ""):
        return  # vLLM finds an OpenMP itself, later, and preloads it by executing its processes anew
    os.environ[VARIABLE] = "1"
    multiprocessing.set_forkserver_preload([PROCESS, PRELOAD, PREPARED])
    if why := _why_apart(os.environ["LD_PRELOAD"]):
        log.info("engines are not forked from this process, which %s: what both import is in memory twice", why)
        forkserver.ensure_running()
        return
    # OpenMP reads it when it is first asked for anything: this process's threads go where they like.
    affinity = os.environ.pop("KMP_AFFINITY", None)
    preload = importlib.import_module(PRELOAD)
    for model, options in models:
        preload.tokenizer(model, options)
    importlib.import_module(PREPARED)
    imported()
    if affinity is not None:
        os.environ["KMP_AFFINITY"] = affinity
    gc.freeze()
    _fork()


def settle() -> None:
    """Be the fork server."""
    die_with_parent()
    setproctitle.setproctitle("loradock: fork server")


def _why_apart(libraries: str) -> str:
    """What forbids forking this process into one that these libraries are preloaded in; empty if nothing does."""
    if not _preloaded(libraries):
        return "runs over other libraries"
    return f"has {threads} threads" if (threads := _threads()) > 1 else ""


def _preloaded(libraries: str) -> bool:
    """Whether this process itself runs over these libraries."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    return all(os.path.realpath(library) in mapped for library in libraries.split(":"))


def _threads() -> int:
    """Of this process, those too that Python knows nothing of: a replica's in Ray."""
    return len(os.listdir("/proc/self/task"))


def _fork() -> None:
    """What multiprocessing does to start a fork server, with this process in place of a new one."""
    setproctitle.getproctitle()  # where a title goes is found through the environment, before it is changed any further
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        address = arbitrary_address("AF_UNIX")
        listener.bind(address)
        if not is_abstract_socket_namespace(address):
            os.chmod(address, 0o600)
        listener.listen()
        alive, ours = os.pipe()
        pid = os.fork()
        if not pid:
            _serve(listener.detach(), alive)
        os.close(alive)
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server._forkserver_alive_fd = ours
    server._forkserver_pid = pid


def _serve(listener: int, alive: int) -> NoReturn:
    """In the forked process: nothing of the server's stays open, and it logs nothing by the server's handlers."""
    code = 1
    try:
        keep = {0, 1, 2, listener, alive}
        for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
            if descriptor not in keep:
                with suppress(OSError):
                    os.close(descriptor)
        for logger in [logging.getLogger(name) for name in LOGGERS]:
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)
        tracker: Any = resource_tracker._resource_tracker
        tracker._fd = tracker._pid = None
        settle()
        gc.enable()
        forkserver.main(listener, alive, [])
    except SystemExit:
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def wanted() -> bool:
    """Whether vLLM's processes come from a fork server."""
    return os.environ.get(VARIABLE) == "1"


def ensure() -> None:
    """Have it running, if it is wanted: it ends with the thread that starts it, so that must be one that stays."""
    if wanted():
        _ensure_running()


def _ensure_running() -> None:
    # Engines bind their threads to cores of those that they are started on.
    with hardware.every_core():
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
    running = threading.Event()

    def keep() -> None:
        try:
            _ensure_running()
        finally:
            running.set()
        threading.Event().wait()  # it ends with the thread that started it

    threading.Thread(target=keep, daemon=True, name="forkserver").start()
    running.wait()


def install() -> None:
    """Let vLLM start processes from there, if there is one."""
    if not wanted():
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


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Popen(popen_forkserver.Popen):
    """As multiprocessing's, but the process is told what to do once it is there, and a fork server that does not make
    it is left for a fresh one. What it makes in the end is told nothing, and ends."""

    _fds: list[int]  # that it inherits

    def _launch(self, process_obj: Any) -> None:
        data = spawn.get_preparation_data(process_obj._name)
        told = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(data, told)
            reduction.dump(process_obj, told)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, tell = forkserver.connect_to_new_process(self._fds)
        if not wait([self.sentinel], ANSWER_SECONDS):
            log.warning("the fork server has not answered for %.0f s: the next one takes its place", ANSWER_SECONDS)
            os.close(self.sentinel)
            os.close(tell)
            leave()
            self.sentinel, tell = forkserver.connect_to_new_process(self._fds)
        # As a sentinel of this process in the other one.
        held = os.dup(tell)
        self.finalizer = util.Finalize(self, _close, (held, self.sentinel))
        self.pid = forkserver.read_signed(self.sentinel)
        with open(tell, "wb") as pipe:
            pipe.write(told.getbuffer())


class Process(ForkServerProcess):
    """A process with the environment that its creator has when it starts it, as after fork or spawn."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return Popen(process_obj)

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
