"""vLLM's functions are found in its source, and known by what they compute."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest

from serve.cpu_kernels import digest
from serve.vllm_backend.patches.functions import current_digest
from serve.vllm_backend.patches.sources import Sources
from serve.vllm_backend.patches.table import HOOKS, PATCHES, PINNED, READ

FILES = {
    "pkg/__init__.py": "",
    "pkg/base.py": """
        class Base:
            def run(self, x):
                return x
    """,
    "pkg/child.py": """
        from .base import Base as Parent
        try:
            from nowhere import helper
        except ImportError:
            def helper(x): return x
        LIMIT: int = 3
        class Child(Parent):
            def stop(self): pass
    """,
}


@pytest.fixture
def sources(tmp_path) -> Sources:
    wheel = tmp_path / "pkg.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text.replace("\n        ", "\n"))
    return Sources.wheel(wheel)


def test_a_method_is_found_in_the_class_or_in_its_bases(sources):
    assert sources.digest("pkg.child:Child.run") == sources.digest("pkg.base:Base.run") is not None
    assert sources.digest("pkg.child:Child.gone") is None and sources.digest("pkg.gone:Child.run") is None
    assert sources.function("pkg.child:helper").name == "helper"


def test_what_can_be_imported_is_known(sources):
    for name in ("Child", "Parent", "helper", "LIMIT"):
        assert sources.has("pkg.child", name)
    assert sources.has("pkg", "base") and sources.has("pkg.base")
    assert not sources.has("pkg.child", "gone") and not sources.has("pkg.gone")


def test_only_what_is_computed_counts():
    def of(text: str) -> str:
        return digest.of_node(ast.parse(text).body[0])

    plain = of("def f(x, y=1):\n    return x + y")
    assert of('def f(x: int, y: int = 1) -> int:\n    """Adds."""\n    # so\n    return (x +\n            y)') == plain
    for other in ("def f(x, y=2): return x + y", "def f(x, y=1): return x - y", "@g\ndef f(x, y=1): return x + y"):
        assert of(other) != plain


def functions():
    return {each.place: each for patch in PATCHES for each in patch.functions} | {
        each.place: each for each in HOOKS.values()
    }


def test_the_table_was_read_against_the_vllm_that_is_installed():
    """Both ways of looking agree: the source of the object that is replaced, and the file that it is in."""
    pytest.importorskip("vllm")
    from vllm.version import __version__

    assert __version__.split("+")[0] == PINNED
    sources = Sources.installed()
    assert {place: sources.digest(place) for place in functions()} == {
        place: each.digest for place, each in functions().items()
    }
    assert {place: current_digest(each) for place, each in functions().items()} == {
        place: each.digest for place, each in functions().items()
    }


def test_entries_say_what_was_read_and_which_functions_of_ours_take_their_place():
    for patch in PATCHES:
        assert patch.why and patch.functions
        assert set(patch.needs) <= {other.name for other in PATCHES}
        for each in patch.functions:
            assert {*each.changed, *each.fixed} <= set(READ[1:])
            module, _, name = each.replacement.partition(":")
            if module:
                source = Path(*module.split(".")).with_suffix(".py").read_text()
                assert f"def {name}(" in source
            else:
                assert Path(*each.via.split(".")).with_suffix(".py").exists()
