"""What of this machine decides the bytes that a step writes. Without torch, where there is no GPU."""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Instruction sets by which kernels differ, as Linux calls them: x86's, then Arm's.
SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


def threads() -> int:
    """How many threads a step computes with: sums are added up in another order with another number."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(outermost) if outermost.isdecimal() and int(outermost) else len(os.sched_getaffinity(0))


def instruction_sets() -> str:
    """The instruction sets that kernels are chosen by, such as `avx2 avx512f`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return " ".join(name for name in SETS if name in has)


def multiplies_bfloat16() -> bool:
    """Without it models compute in float32, and each weight is copied for that."""
    return bool({"avx512_bf16", "amx_bf16"}.intersection(instruction_sets().split()))


def has_tiles() -> bool:
    """Whether bfloat16 matrices are multiplied by AMX."""
    return "amx_bf16" in instruction_sets().split()


def release() -> None:
    """Have the C library give back what is freed, where it has a way: it would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def arithmetic() -> dict[str, int | str]:
    """Under which the same inputs give the same bytes."""
    return {"threads": threads(), "instruction_sets": instruction_sets()}


@dataclass(frozen=True, slots=True)
class GPU:
    """The first of this machine's, its bytes of memory, and the name by which its driver knows it."""

    name: str
    memory: int
    uuid: str = ""

    def free(self) -> int:
        """Bytes that nothing holds now: a server may compute there too."""
        try:
            return _free_by_driver(self.uuid)
        except Exception:  # of nvidia-ml-py's many, or it is not installed
            import torch

            return int(torch.cuda.mem_get_info(0)[0])


def _free_by_driver(uuid: str) -> int:
    """As the driver says it: torch would begin to compute there to ask."""
    pynvml: Any = importlib.import_module("pynvml")
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    finally:
        pynvml.nvmlShutdown()


@cache
def gpu() -> GPU | None:
    """None where there is none, or where torch was built for a CPU."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return GPU(found.name, int(found.total_memory), f"GPU-{found.uuid}")
