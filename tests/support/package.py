"""A package of somebody else's: the file that docs/contributing.md shows, and its one line."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/contributing.md"


def installed(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install it in this process; the module's source, as the page has it."""
    page = PAGE.read_text()
    (source,) = re.findall(rf"```py\n# {module}\.py\n(.*?)```", page, re.DOTALL)
    ((group, line),) = re.findall(rf'\[project\.entry-points\."([\w.]+)"\][^`]*`[^`]*`([\w-]+ = "{module}:\w+")`', page)
    (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    return str(source)
