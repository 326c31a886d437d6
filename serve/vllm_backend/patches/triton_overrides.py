"""vLLM's substitutes for its Triton kernels on a CPU, registered once, before processes are forked.

Every worker of vLLM's registers them, and looks at each value of each module for it. Python counts whoever looks, so a
forked process had 150 MB of imports to itself afterwards that it had shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_registered = False


def register_once(original: Callable[[Any], None], platform: Any) -> None:
    global _registered
    if not _registered:
        original(platform)
        _registered = True
