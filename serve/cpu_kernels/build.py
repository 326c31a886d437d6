"""C++ sources, compiled once for this processor; and the kernels of them, loaded. None where there is no compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from serve.files import fsync, rename
from serve.models import hardware

log = logging.getLogger("loradock")

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("kernels.cpp", "step.cpp", "packing.cpp", "ggml.cpp")]
HEADERS = sorted(FOLDER.glob("*.h"))
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
# Another processor to compile for than the one at hand, as the compiler names it, to try an older one's kernels
# (LORADOCK_CPU_MARCH=haswell is AVX2, skylake-avx512 is AVX-512 without VNNI and BF16, armv8.2-a+dotprod is NEON), and
# what else to tell it ("native -DLORADOCK_TILES" does by plain loops what AMX does).
MARCH = "LORADOCK_CPU_MARCH"
# For arm64 whole steps were compared in an emulator and never ran in a server: they are computed where this is 1.
ARM64 = "LORADOCK_ARM64_STEP"


def compiler() -> str | None:
    """The C++ compiler that torch.compile would take too."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, their operators registered with torch. Compiling takes two seconds, the first time."""
    try:
        path = _compiled()
        if path is None:
            return None
        loaded = ctypes.CDLL(str(path))
        if loaded.loradock_register():
            raise OSError("torch does not take the operators")
        loaded.loradock_instructions.restype = ctypes.c_char_p
        if loaded.loradock_instructions():
            loaded.loradock_argmax.restype = ctypes.c_int64
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the CPU LoRA kernels cannot be had (%s): plain torch operations take their place", error)
        return None
    return loaded


def instructions() -> str:
    """What the kernels compute a step with: AVX2, AVX-512 or NEON, and which parts of it; "" where they can't."""
    kernels = library()
    return "" if kernels is None else kernels.loradock_instructions().decode()


def step_available() -> bool:
    """Whether a whole step can be computed on this processor, and may be."""
    return bool(instructions()) and (platform.machine() not in ("aarch64", "arm64") or os.environ.get(ARM64) == "1")


def keeps_gguf(lora_kernels: str, cpu_weights: str, engine: Mapping[str, Any]) -> bool:
    """Whether a GGUF file's weights are multiplied as they are in it, by these settings and options of an engine."""
    alone = all(str(engine.get(f"{kind}_parallel_size", 1)) == "1" for kind in ("tensor", "pipeline"))
    plain = str(engine.get("dtype", "auto")) in ("auto", "bfloat16") and not engine.get("quantization")
    return cpu_weights == "auto" and alone and plain and bool(compiler()) and hardware.fused_step(lora_kernels)


def compiled(
    name: str,
    sources: Mapping[Path, Sequence[str]],
    headers: Sequence[Path] = (),
    link: Sequence[str] = (),
    facts: Sequence[str] = (),
) -> Path | None:
    """The library of these sources, each with its flags; made if need be, None where there is no compiler.

    facts: others make another library.
    """
    folder = cache_folder()
    target = folder / f"{name}-{_digest(sources, headers, facts)}.so"
    if target.exists():
        return target
    command = compiler()
    if command is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside, f"{name}.so")
        objects = [Path(aside, f"{source.stem}.o") for source in sources]
        compiling = [
            _started([command, *flags, "-c", "-o", str(out), str(source)])
            for (source, flags), out in zip(sources.items(), objects, strict=True)
        ]
        for process in compiling:
            _finished(process)
        _finished(_started([command, "-shared", "-o", str(made), *map(str, objects), *link]))
        fsync(made)
        rename(made, target)
    return target


def compiled_kernels(folder: Path = FOLDER, *flags: str) -> Path | None:
    """The library of the kernels whose sources are in a folder."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    # OpenMP's functions come from whichever OpenMP torch runs on: a second one beside it would fight for the cores.
    link = [f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-all"]
    all_flags = [*f"-march={os.environ.get(MARCH) or 'native'}".split(), *FLAGS, *flags]
    sources = {folder / source.name: all_flags for source in SOURCES}
    return compiled("kernels", sources, sorted(folder.glob("*.h")), link, (torch.__version__,))


def _compiled() -> Path | None:
    path = compiled_kernels()
    if path is None:
        log.warning("no C++ compiler for the CPU LoRA kernels: plain torch operations take their place; install g++")
    return path


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise OSError(f"the compiler fails: {errors.strip()[:500]}")


def cache_folder() -> Path:
    """Where compiled kernels are kept, and large tables lie."""
    if cache_dir := os.environ.get("LORADOCK_CACHE_DIR"):
        return Path(cache_dir, "kernels")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock" / "kernels"


def _digest(sources: Mapping[Path, Sequence[str]], headers: Sequence[Path], others: Sequence[str]) -> str:
    """Another processor, compiler, source or flag makes another file."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        cpuinfo = []
    processor = next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")
    facts = [
        *(source.read_text() for source in (*sources, *headers)),
        *(" ".join(flags) for flags in sources.values()),
        *others,
        platform.machine(),
        processor,
        compiler() or "",
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
