"""torchaudio and torchcodec beside torch's CPU build: vLLM requires them, and PyPI has their CUDA builds only.

Importing those fails without CUDA's libraries, and takes transformers' import with it. transformers and vLLM do without
them where they are not installed; so they are hidden from this process before anything imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata

NAMES = ("torchaudio", "torchcodec")


def version(distribution: str) -> str:
    """The installed version of a distribution; empty where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def unusable(version: Callable[[str], str] = version) -> list[str]:
    """Those that are installed and were not built for the CPU, while torch was."""
    if not version("torch").endswith("+cpu"):
        return []
    return [name for name in NAMES if (installed := version(name)) and not installed.endswith("+cpu")]


def hide() -> None:
    """Make the unusable ones look absent, to `import` and to `importlib.util.find_spec`."""
    for name in unusable():
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
