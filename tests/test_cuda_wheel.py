"""What the tests run on is what a GPU runs on: vLLM's wheels for CPUs and CUDA have the same Python where it counts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm")

from serve.vllm_backend.patches.sources import Sources
from serve.vllm_backend.patches.table import PINNED
from tests.campaigns import cuda_wheel, vllm_diff
from tests.campaigns.cuda_wheel import ARGUED, RECORD

KNOWN = json.loads(RECORD.read_text())
# Names that a module which differs gives to others, the same in both wheels.
TAKEN = {"vllm/platforms/__init__.py": {"current_platform"}}


def test_the_record_is_of_the_pinned_version_and_each_difference_is_argued():
    assert KNOWN["version"] == PINNED, "run `make cuda-wheel ARGS=--write`"
    assert set(KNOWN["differing"]) == set(ARGUED)
    assert KNOWN["cuda_alone"] == KNOWN["cpu_alone"] == []


def test_all_other_modules_of_the_installed_wheel_are_cudas_by_their_sha256():
    files = cuda_wheel.installed()
    if any(path.startswith("vllm/third_party/deep_gemm/") for path in files):
        pytest.skip("the wheel for CUDA is installed")
    assert len(files) == KNOWN["modules"] > 2000
    assert cuda_wheel.tree(files, KNOWN["differing"]) == KNOWN["same"]


def test_nothing_that_is_replaced_or_set_is_in_a_module_that_differs():
    """So each function, import and option that the tests find here is in the wheel for CUDA, with the same text."""
    read: set[str] = set()
    sources = cuda_wheel.read_of(Sources.installed(), read)
    assert vllm_diff.compare(sources, vllm_diff.functions(), {}, vllm_diff.settings()).none
    assert len(read) > 30 and not read & KNOWN["differing"].keys()


def test_of_a_module_that_differs_only_what_is_the_same_is_imported():
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in ARGUED}
    taken: dict[str, set[str]] = {}
    for places in vllm_diff.imported().values():
        for module, _, name in (place.partition(":") for place in places):
            if module in modules:
                taken.setdefault(modules[module], set()).add(name)
    assert taken == TAKEN


def test_a_module_that_differs_is_named():
    same, other = {"vllm/a.py": "1", "vllm/b.py": "2"}, {"vllm/a.py": "1", "vllm/b.py": "3", "vllm/c.py": "4"}
    found = cuda_wheel.record(other, same)
    assert (found["differing"], found["cuda_alone"]) == ({"vllm/b.py": "3"}, ["vllm/c.py"])
    assert found["same"] == cuda_wheel.tree({"vllm/a.py": "1"}, []) != cuda_wheel.tree({"vllm/a.py": "5"}, [])
