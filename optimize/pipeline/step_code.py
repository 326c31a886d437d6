"""Which code made a finished step: a step is redone when its code is another."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimize.checkpoint import artifact
from optimize.pipeline.worker import work
from optimize.steps.kind import kinds

ROOT = Path(__file__).resolve().parents[2]


def of(kind: str, options: Mapping[str, Any] | None = None) -> str:
    """The digest of the code of a kind of step, with what these options choose."""
    chosen = kinds()[kind].chosen(options) if kind in kinds() and options is not None else ()
    return artifact.key([digest(module) for module in (work(kind), *chosen)])


@cache
def digest(module: str) -> str:
    """The digest of a module and of those of ours that it imports."""
    digests: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        file = _file(name) if name == module else _ours(name)
        if name in digests or file is None or not file.is_file():
            continue
        digests[name] = artifact.digest(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return artifact.key(digests)


def _ours(name: str) -> Path | None:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py") if name.startswith("optimize.") else None


def _file(name: str) -> Path | None:
    """Also of a module that another package offers."""
    if (ours := _ours(name)) and ours.is_file():
        return ours
    spec = find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None
