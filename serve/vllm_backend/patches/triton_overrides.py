"""vLLM's substitutes for its Triton kernels on a CPU, registered once, before processes are forked.

Every worker of vLLM's registers them, and looks at each value of each module for it. Python counts whoever looks, so a
forked process had 150 MB of imports to itself afterwards that it had shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.cpu_kernels.patches import Patch, apply

PATCHES = [
    Patch(
        "vllm.platforms.cpu:CpuPlatform",
        "register_triton_kernel_overrides",
        "cls",
        f"{__name__}:register_once",
        "it looks at each value of each module, so that a forked process shares nothing any more",
    )
]
_registered = False


def install() -> None:
    """Have them registered by the first in this process, or in the one that it was forked from; on a CPU alone."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        apply(PATCHES)


def register() -> None:
    """Register them now; modules that are imported later get the substitutes by the kernels' names."""
    from vllm.platforms import current_platform

    install()
    current_platform.register_triton_kernel_overrides()


def register_once(original: Callable[[Any], None], platform: Any) -> None:
    global _registered
    if not _registered:
        original(platform)
        _registered = True
