"""NVIDIA's GPUs as their driver describes them: nothing begins to compute on one for it.

Those that CUDA would show to a process with these variables, in its order: whole cards, and where a card is cut into
MIG slices, the slice that CUDA takes of it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Of drivers that some build of vLLM computes with: NVIDIA's, also in WSL, AMD's, Intel's, and accelerators.
DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd", "dri/renderD*", "accel/accel*", "accel[0-9]*", "vfio/[0-9]*")


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU, or one slice of it; sizes in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int] = (0, 0)
    in_slices: bool = False


def cards(environ: Mapping[str, str] | None = None, nvml: Any = None) -> list[Card]:
    """All that are visible; none where there is no driver, or it does not answer.

    `nvml`: NVIDIA's library, as nvidia-ml-py has it.
    """
    nvml = nvml or _library()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
        try:
            return [
                _card(nvml, handle)
                for handle in _visible(nvml, (os.environ if environ is None else environ).get(VISIBLE))
            ]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        log.warning("NVIDIA's driver does not say how much memory GPUs have: %s", error)
        return []


def check_present(devices: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> None:
    """ConfigError where vLLM would look for a GPU in vain: it says so late, in several tracebacks."""
    if not any(True for pattern in DEVICE_FILES for _ in devices.glob(pattern)):
        raise ConfigError(
            "no GPU here: vLLM's build for CPUs is not installed, and no driver shows a device "
            f"({devices}/nvidia0). Install the driver; give a container its GPUs (`docker run --gpus all`, "
            "with NVIDIA's toolkit on the host); or install loradock[cpu] in place of loradock[gpu]"
        )
    if environ.get(VISIBLE, "0").strip() in ("", "-1"):
        raise ConfigError(f"no GPU here: {VISIBLE}={environ[VISIBLE]!r} hides all of them. Unset it, or name one")


def _library() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _visible(nvml: Any, named: str | None) -> Iterator[Any]:
    """Handles of what CUDA_VISIBLE_DEVICES names: indices, UUIDs of cards or slices, up to the first that is none."""
    whole = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    if named is None:
        names = [str(number) for number in range(len(whole))]
    else:
        names = [name.strip() for name in named.split(",")]
    slices = False
    for name in names:
        if name.isdigit() and int(name) < len(whole):
            handle = _slice(nvml, whole[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
            handle = handle if name.startswith("MIG-") else _slice(nvml, handle)
        else:
            return
        # CUDA shows one slice to a process, and no other device beside it.
        if slices:
            return
        slices = _is_slice(nvml, handle)
        yield handle


def _slice(nvml: Any, handle: Any) -> Any:
    """The first slice of a card that is cut into slices; the card itself where it is whole."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
        if not mode:
            return handle
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except nvml.NVMLError:  # a number that no slice has
                continue
    except nvml.NVMLError:  # a card that knows no slices
        pass
    return handle


def _is_slice(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
    except nvml.NVMLError:
        return False


def _card(nvml: Any, handle: Any) -> Card:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    in_slices = _is_slice(nvml, handle)
    whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if in_slices else handle
    try:
        capability = tuple(int(part) for part in nvml.nvmlDeviceGetCudaComputeCapability(whole))
    except nvml.NVMLError:
        capability = (0, 0)
    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else str(name)
    return Card(name, int(memory.total), int(memory.free), (capability[0], capability[1]), in_slices)
