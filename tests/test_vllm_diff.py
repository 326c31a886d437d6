"""`make vllm-diff` names what another vLLM changes of what loradock replaces or imports, and nothing else."""

from __future__ import annotations

import pytest

from serve.vllm_backend.patches.patch import Function
from serve.vllm_backend.patches.sources import Sources
from tests.campaigns import vllm_diff

PINNED = """
from pkg.helpers import give

class Sampler:
    def pick(self, x):
        return x
    def best(self, x):
        return max(x)

def rows(x):
    return x[0]
"""
LATER = """
class Sampler:
    def pick(self, x: int):
        # said in other words
        return x
    def best(self, x):
        return min(x)

def rows(x):
    return x[1]
"""


def sources(text: str) -> Sources:
    return Sources({"pkg/__init__.py": "", "pkg/sampler.py": text, "pkg/helpers.py": "give = take = 1"}.__getitem__)


@pytest.fixture
def known() -> dict[str, Function]:
    places = ("pkg.sampler:Sampler.pick", "pkg.sampler:Sampler.best", "pkg.sampler:rows")
    return {place: Function(place, sources(PINNED).digest(place)) for place in places}


IMPORTS = {
    "a.py give": {"pkg.sampler:give"},
    "b.py take": {"pkg.gone:take", "pkg.helpers:take"},
    "c.py pkg": {"pkg.sampler:"},
}


def test_the_version_that_is_pinned_has_no_differences(known):
    assert vllm_diff.compare(sources(PINNED), known, IMPORTS).none


def test_what_changed_is_named_and_no_other(known):
    differences = vllm_diff.compare(sources(LATER), known, IMPORTS)
    assert differences.changed == ["pkg.sampler:Sampler.best", "pkg.sampler:rows"]
    assert differences.imports == ["pkg.sampler:give (a.py)"]
    said = list(vllm_diff.report("9.0", differences, known))
    assert said[-2] == "vLLM 9.0: 2 of 3 functions differ from 0.32.0, 2 not read; 1 imports and 0 options are gone"
    gone = vllm_diff.compare(sources(LATER.replace("def rows", "def lines")), known, {})
    assert gone.gone == ["pkg.sampler:rows"]


def test_what_was_read_or_is_done_by_vllm_itself_is_told_apart(known):
    later = sources(LATER)
    best, rows = (known[place] for place in ("pkg.sampler:Sampler.best", "pkg.sampler:rows"))
    known[best.place] = Function(best.place, best.digest, changed={"0.33.0": later.digest(best.place)})
    known[rows.place] = Function(rows.place, rows.digest, fixed={"0.33.0": later.digest(rows.place)})
    differences = vllm_diff.compare(later, known, {})
    assert (differences.read, differences.fixed, differences.changed) == ([best.place], [rows.place], [])
    assert not differences.none, "it is another version all the same"


def test_the_installed_vllm_is_the_pinned_one():
    pytest.importorskip("vllm")
    differences = vllm_diff.compare(Sources.installed(), vllm_diff.functions(), vllm_diff.imported())
    assert differences.none, differences
