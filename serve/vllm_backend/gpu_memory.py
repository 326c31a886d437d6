"""Whether GPUs have room for one more engine, asked of their driver: no process begins to compute on one for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from serve.errors import ConfigError
from serve.models.hardware import gib


def check(args: Any) -> None:
    """ConfigError where an engine with these arguments would find too little memory when it starts.

    vLLM wants `gpu_memory_utilization` of each of its GPUs to be free, whatever it will use of it.
    """
    for number, (free, total) in enumerate(free_memory(args)):
        wanted = math.ceil(total * args.gpu_memory_utilization)
        if free < wanted:
            raise ConfigError(
                f"an engine takes {gib(wanted)} of GPU {number} (gpu_memory_utilization="
                f"{args.gpu_memory_utilization:g}), and {gib(free)} of its {gib(total)} are free: lower "
                "gpu_memory_utilization, so that two fit"
            )


def free_memory(args: Any) -> Iterator[tuple[int, int]]:
    """(free, all) bytes of each GPU that an engine with these arguments takes; of those on other nodes nothing, nor
    where the driver is not NVIDIA's."""
    if not current_platform.is_cuda():
        return
    parts = args.tensor_parallel_size * args.pipeline_parallel_size * (args.data_parallel_size_local or 1)
    if args.data_parallel_size_local is None:
        parts *= args.data_parallel_size
    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        for device in range(min(parts, current_platform.device_count())):
            physical = current_platform.visible_device_id_to_physical_device_id(device)
            memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(physical))
            yield int(memory.free), int(memory.total)
    finally:
        nvml.nvmlShutdown()
