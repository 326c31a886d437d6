"""docs/works-with.md: each row is a test about its tool, and one that CI does not run says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

import pytest

from tests.support.server import ROOT


@dataclass(frozen=True)
class Row:
    tool: str
    works: str
    test: str

    @property
    def files(self) -> list[str]:
        return re.findall(r"`(tests/[\w./]+\.py)`", self.test)

    @property
    def text(self) -> str:
        return "\n".join((ROOT / file).read_text() for file in self.files)

    @property
    def names(self) -> list[str]:
        """What the tool is called: words with a capital letter, in code, or with a dash."""
        words = re.findall(r"`([^`]+)`|([\w'-]*[A-Z][\w-]*|\w+-\w+)|^(\w+),", self.tool)
        return [name.removesuffix("'s") for groups in words for name in groups if name]


def rows() -> list[Row]:
    lines = (ROOT / "docs/works-with.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [Row(*each) for each in cells[2:]]


each = pytest.mark.parametrize("row", rows(), ids=lambda row: row.tool[:40])


def test_the_table_has_rows():
    assert len(rows()) >= 20


@each
def test_a_row_names_tests_that_are_about_its_tool(row):
    assert row.files and not [file for file in row.files if not (ROOT / file).is_file()]
    text = re.sub(r"[_\s]", "-", row.text.lower())
    assert any(re.sub(r"[_\s]", "-", name.lower()) in text for name in row.names), row.names


@each
def test_a_row_is_a_test_that_ci_runs_or_says_that_it_is_not(row):
    says_so = "not in CI" in row.works + row.test
    is_test = all(re.search(r"^(?:async )?def test_", (ROOT / file).read_text(), re.M) for file in row.files)
    assert is_test or says_so
    if not is_test:
        target = re.search(r"`make ([a-z-]+)`", row.test)
        assert target and f"\n{target[1]}: " in (ROOT / "Makefile").read_text()
    skipped = {name.partition(".")[0] for name in re.findall(r"importorskip\(\s*\"([\w.]+)\"", row.text)}
    absent = [name for name in skipped if find_spec(name) is None]
    assert not absent or says_so, f"{', '.join(absent)} is not installed here"
