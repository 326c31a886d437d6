"""The kernels as they are compiled for other processors compute what those for this one do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build
from tests.support.kernel_results import compare

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")

# As compilers name them, and what is computed with there.
PROCESSORS = {"haswell": "AVX2", "alderlake": "AVX2 VNNI", "skylake-avx512": "AVX-512"}


def results(march: str, folder: Path) -> dict[str, Any]:
    """What the kernels compute that are compiled for a processor; skips if this one cannot execute them."""
    file, root = folder / f"{march}.pt", Path(__file__).parents[3]
    environ = {**os.environ, build.MARCH: march, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.support.kernel_results", str(file)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=root)
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor cannot execute what is compiled for {march}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return torch.load(file)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[str, Any]:
    return results("native", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("march", PROCESSORS)
def test_every_processor_computes_the_same_up_to_rounding(march, here, tmp_path):
    there = results(march, tmp_path)
    assert there["instructions"] == PROCESSORS[march]
    compare(here, there)


def test_a_processor_that_the_compiler_does_not_know_is_said(monkeypatch, caplog):
    monkeypatch.setenv(build.MARCH, "abacus")
    assert build.library.__wrapped__() is None
    assert "abacus" in caplog.text and "plain torch operations" in caplog.text
