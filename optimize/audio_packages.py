"""Hides torchaudio and torchcodec where they cannot be imported.

vLLM requires them, and PyPI has their CUDA builds only: beside torch's CPU build their import fails, and takes
transformers' with it, which does without them where they are not installed.
"""

from __future__ import annotations

import sys
from importlib import metadata


def hide() -> None:
    """Make those that were not built for the CPU look absent, if torch was; before anything imports them."""
    if not _version("torch").endswith("+cpu"):
        return
    for name in ("torchaudio", "torchcodec"):
        if not _version(name).endswith("+cpu"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
