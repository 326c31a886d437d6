"""The kernels for arm64, in an emulator: no such machine is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build
from tests.support import arm64, kernel_results

# As compilers name them: what is computed with there, and a processor to emulate.
PROCESSORS = {"armv8.2-a+dotprod": ("NEON dotprod", "neoverse-n1"), "armv8.6-a": ("NEON dotprod BF16", "max")}
CROSS = Path("/usr/aarch64-linux-gnu")  # Debian's C library beside its cross compiler
PROGRAM = [arm64.ROOT / "tests/support/products.cpp", "-O1", "-std=c++17", "-o"]

pytestmark = [
    pytest.mark.skipif(
        not build.step_available(), reason="no kernels for this processor to compare with, or no compiler"
    ),
    pytest.mark.skipif(bool(why := arm64.lacking(arm64.COMPILER, arm64.EMULATOR)), reason=why),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> list[str]:
    """What the program prints of this machine's kernels."""
    program = tmp_path_factory.mktemp("products") / "products"
    subprocess.run([build.compiler(), *PROGRAM, program], check=True)
    environ = {**os.environ, "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib")}
    command = [program, build.library()._name]
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.splitlines()


def there(march: str, processor: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What it prints of those for arm64."""
    monkeypatch.setenv("CXX", arm64.COMPILER)
    flags = [f"-march={march}", *build.FLAGS]
    link = ["-fopenmp", "-Wl,--unresolved-symbols=ignore-all"]  # torch's, which are not called
    library = build.compiled("arm64", dict.fromkeys(build.SOURCES, flags), build.HEADERS, link)
    subprocess.run([arm64.COMPILER, *PROGRAM, folder / "products"], check=True)
    return arm64.run(processor, CROSS, folder / "products", library).splitlines()


@pytest.mark.parametrize("march", PROCESSORS)
def test_products_are_the_same_to_the_last_bit(march, here, tmp_path, monkeypatch):
    words, processor = PROCESSORS[march]
    instructions, *results = there(march, processor, tmp_path, monkeypatch)
    assert instructions == words
    assert len(results) == 14
    for mine, other in zip(here[1:], results, strict=True):
        assert mine == other, mine.partition("\t")[0]


def test_a_processor_without_dot_products_has_no_step(tmp_path, monkeypatch):
    assert there("armv8-a", "cortex-a53", tmp_path, monkeypatch) == [""]


@pytest.mark.skipif("LORADOCK_TEST_ARM64" not in os.environ, reason="takes minutes: make arm64")
@pytest.mark.parametrize("march", PROCESSORS)
def test_steps_and_adapters_are_the_same_up_to_rounding(march, tmp_path):
    words, processor = PROCESSORS[march]
    mine, other, root = tmp_path / "here.pt", tmp_path / "there.pt", arm64.python_with_torch()
    subprocess.run([sys.executable, "-m", "tests.support.kernel_results", mine], cwd=arm64.ROOT, check=True)
    python = [root / "usr/bin/python3", "-m", "tests.support.without_vllm", "tests.support.kernel_results", other]
    environ = {"PYTHONPATH": f"{root / 'torch'}:{arm64.ROOT}", "CXX": arm64.COMPILER, build.MARCH: march}
    environ[build.ARM64] = "1"
    arm64.run(processor, root, *python, **environ)
    results = torch.load(other)
    assert results["instructions"] == words
    kernel_results.compare(torch.load(mine), results)
