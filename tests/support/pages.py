"""README and docs as pages with code blocks.

Blocks of `bash` and `python` are run (tests/e2e/test_readme.py) and `yaml` is parsed; the others are only shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support.server import ROOT

# In the order in which somebody new reads and types them; the others follow.
FIRST = ("README.md", "docs/quickstart.md", "docs/adapters.md")


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and content of every code block."""
        return re.findall(r"^```(\w+)\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def of(self, *kinds: str) -> list[str]:
        return [block for kind, block in self.blocks if kind in kinds]

    @property
    def script(self) -> str:
        """Everything on the page that is to be typed, in one shell, as a reader does; `make` is tested on its own."""
        lines = []
        for kind, block in self.blocks:
            if kind == "bash" and not block.startswith("make "):
                lines.append(block)
            elif kind == "python":
                lines.append(f"python - <<'PYTHON'\n{block}PYTHON\n")
        return "".join(lines)


def pages() -> list[Page]:
    rest = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if not {"_build", "generated"} & {*path.parts}
    )
    return [Page(ROOT / name) for name in dict.fromkeys([*FIRST, *rest])]
