"""What vLLM's libraries compile with when an engine starts on a GPU, and what it does without where that is missing.

vLLM samples through FlashInfer, which compiles with CUDA's nvcc and with ninja at the engine's first step, and computes
weights in blocks of FP8 through DeepGEMM on Hopper and Blackwell, which compiles with nvcc. CUDA's wheels bring parts
of a toolkit that neither of them finds. An engine without them dies while it warms up, unless it is told to use vLLM's
own kernels.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SAMPLER, DEEP_GEMM = "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_DEEP_GEMM"
DEFAULT_HOME = Path("/usr/local/cuda")


def _headers() -> Path:
    return Path(sysconfig.get_paths()["include"])


@dataclass(frozen=True, slots=True)
class Toolkit:
    """CUDA's compiler, ninja and Python's headers, looked up as FlashInfer, DeepGEMM and Triton look them up.

    `bin`: the environment's, which is put on PATH for the engine.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    default_home: Path = DEFAULT_HOME
    headers: Path = field(default_factory=_headers)
    bin: Path = Path(sys.executable).parent

    @property
    def path(self) -> str:
        """PATH with the environment's own programs on it: `make serve` starts a program in there by its path."""
        folders = [folder for folder in self.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
        return os.pathsep.join(folders if str(self.bin) in folders else [str(self.bin), *folders])

    @property
    def nvcc(self) -> str | None:
        """A named CUDA_HOME is taken without a look at PATH."""
        if home := self.environ.get("CUDA_HOME") or self.environ.get("CUDA_PATH"):
            return _program(Path(home))
        return shutil.which("nvcc", path=self.path) or _program(self.default_home)

    @property
    def ninja(self) -> str | None:
        return shutil.which("ninja", path=self.path)

    @property
    def missing(self) -> tuple[str, ...]:
        """Of nvcc and ninja."""
        return tuple(name for name, path in (("nvcc", self.nvcc), ("ninja", self.ninja)) if path is None)

    @property
    def has_python_headers(self) -> bool:
        """Triton compiles its launcher against them."""
        return (self.headers / "Python.h").is_file()


def environment(toolkit: Toolkit) -> dict[str, str]:
    """The variables for an engine on a GPU that nobody has set: PATH, and what it has to do without."""
    wanted = {"PATH": toolkit.path}
    if toolkit.missing:
        wanted[SAMPLER] = "0"
    if toolkit.nvcc is None:
        wanted[DEEP_GEMM] = "0"
    return {name: value for name, value in wanted.items() if name == "PATH" or name not in toolkit.environ}


def notice(toolkit: Toolkit, model_is_fp8_block: bool = False) -> str:
    """What `environment` switches off, for a person; empty where it is nothing."""
    off = environment(toolkit)
    if SAMPLER not in off:
        return ""
    without = "vLLM samples without FlashInfer"
    if DEEP_GEMM in off and model_is_fp8_block:
        without += ", and computes this model's blocks of FP8 without DeepGEMM, slower on Hopper and Blackwell"
    return (
        f"{' and '.join(toolkit.missing)} not found: {without} "
        f"({' '.join(f'{name}=0' for name in (SAMPLER, DEEP_GEMM) if name in off)}). To have them, install CUDA's "
        "toolkit and ninja, and set CUDA_HOME"
    )


def _program(home: Path) -> str | None:
    path = home / "bin" / "nvcc"
    return str(path) if os.access(path, os.X_OK) and path.is_file() else None
