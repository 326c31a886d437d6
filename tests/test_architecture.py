"""The house keeps its shape. Who may import whom is import-linter's (`make lint`, contracts in pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for package in ("serve", "optimize") for path in (ROOT / package).rglob("*.py")]
PACKAGES = [path for path in MODULES if path.name == "__init__.py"]

MODULE_LINES = 700
FUNCTION_LINES = 60


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGES, ids=named)
def test_a_package_says_what_lives_there_and_what_may_not(path):
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    top = path.parent.parent == ROOT
    assert said if top else len([line for line in said.splitlines() if line]) >= 2


def test_the_top_of_serve_is_read_at_a_glance():
    entries = [path for path in (ROOT / "serve").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 24, sorted(path.name for path in entries)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_nothing_is_called_after_nothing(path):
    assert not {"utils", "util", "common", "misc", "helpers"} & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_and_its_functions_stay_short(path):
    """Ruff has no such rules. A function that must be longer says why in a comment `# long:` on its first line."""
    source = path.read_text()
    lines = source.splitlines()
    assert len(lines) <= MODULE_LINES, f"{len(lines)} lines; does it still hold one thing?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "# long:" not in lines[node.lineno - 1]:
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} has over {FUNCTION_LINES} lines"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_line_assigns_one_thing_or_a_pair(path):
    """Three values in a line save lines, and cost whoever looks for a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            if not isinstance(node.value, ast.Tuple):
                continue
            assert len(node.value.elts) < 3, f"line {node.lineno}"
