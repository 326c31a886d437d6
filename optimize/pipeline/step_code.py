"""Which code made a finished step: a step is redone when its code is another, unless that code made the same bytes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from optimize.checkpoint import artifact
from optimize.pipeline.worker import TASKS

ROOT = Path(__file__).resolve().parents[2]

# The steps' code before the modules moved into packages (commit 3143cca). Every step still writes the same bytes, so
# what that code finished is taken over. Remove a step's line in the change that makes it write other bytes on purpose.
SAME_BYTES: Mapping[str, tuple[str, ...]] = {
    "merge": ("8434cfd1555dd4cb54ffd93c",),
    "combine": ("5d3b3f99f10cf3427df49b21",),
    "prune": ("1f163469451645b1d393e1c9",),
    "heal": ("71997a0c161d4d2c50149fb9",),
    "quantize": ("74845611e9245615a9d56add",),
    "onnx": ("e5a814cedaa4846f78b0e355",),
    "genai": ("9af76285fe27815273245a95",),
    "evaluate": ("e3ca218ec0f1949813aa861a",),
    "engine": ("1b67eaaa1a8fa0c97d17e483",),
    "tasks": ("ac9bade87cb78f66c24f2df4",),
}


def accepted(kind: str) -> tuple[str, ...]:
    """Digests of the code whose finished steps of this kind are taken: today's first."""
    return (digest(TASKS[kind]), *SAME_BYTES.get(kind, ()))


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
