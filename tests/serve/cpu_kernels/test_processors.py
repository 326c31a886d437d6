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

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no AVX2, or no compiler")

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
    assert there.pop("instructions") == PROCESSORS[march]
    assert there.keys() == here.keys() - {"instructions"}
    for name, tensor in there.items():
        mine, other = here[name].double(), tensor.double()
        apart = (mine - other).abs().max() / mine.abs().max()
        if name.startswith("products"):
            # Of integers the sums are exact. Instructions that multiply bfloat16 round their sums in another way.
            assert apart < (1e-4 if name.endswith("bf16") else 1e-6), name
        elif name.startswith("steps"):
            rows = (mine - other).norm(dim=-1) / mine.norm(dim=-1)
            assert rows.max() < 0.04 and rows.median() < 0.02, name  # a rounding to bfloat16 here and there
        else:
            assert apart < {"argmax": 1e-9, "adapters: torch.float32": 1e-5}.get(name, 2**-6), name


def test_a_processor_that_the_compiler_does_not_know_is_said(monkeypatch, caplog):
    monkeypatch.setenv(build.MARCH, "abacus")
    assert build.library.__wrapped__() is None
    assert "abacus" in caplog.text and "plain torch operations" in caplog.text
