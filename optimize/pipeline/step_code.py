"""Which code made a finished step: a step is redone when its code is another."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from optimize.checkpoint import artifact
from optimize.pipeline.worker import TASKS

ROOT = Path(__file__).resolve().parents[2]


def of(kind: str) -> str:
    """The digest of the code of a kind of step."""
    return digest(TASKS[kind])


@cache
def digest(module: str) -> str:
    """The digest of a module and of those of ours that it imports."""
    digests: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if name in digests or not name.startswith("optimize.") or not file.is_file():
            continue
        digests[name] = artifact.digest(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return artifact.key(digests)
