"""The kernels as they are compiled for other processors compute what those for this one do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
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
# Its tiles are plain loops here, where the processor has none.
TILES = "skylake-avx512 -DLORADOCK_TILES"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the kernels compute that are compiled for a processor; skips if this one cannot execute them."""
    folder, root = tmp_path_factory.mktemp("kernels"), Path(__file__).parents[3]
    pairs = [f"{march}={folder / march}.pt" for march in ("native", *PROCESSORS, TILES)]
    command = [sys.executable, "-m", "tests.support.kernels_of_processors", *pairs]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=root)
    ended = {march: int(code) for code, march in (line.split(" ", 1) for line in done.stdout.splitlines())}

    def computed(march: str) -> dict[str, Any]:
        if ended.get(march) == -signal.SIGILL:
            pytest.skip(f"this processor cannot execute what is compiled for {march}")
        assert ended.get(march) == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return torch.load(folder / f"{march}.pt")

    return computed


def test_prompts_are_multiplied_by_tiles_up_to_their_rounding(results):
    there = results(TILES)
    assert there["instructions"] == "AVX-512 AMX"
    compare(results("native"), there)


@pytest.mark.parametrize("march", PROCESSORS)
def test_every_processor_computes_the_same_up_to_rounding(march, results):
    there = results(march)
    assert there["instructions"] == PROCESSORS[march]
    compare(results("native"), there)


def test_a_processor_that_the_compiler_does_not_know_is_said(monkeypatch, caplog):
    monkeypatch.setenv(build.MARCH, "abacus")
    assert build.library.__wrapped__() is None
    assert "abacus" in caplog.text and "plain torch operations" in caplog.text
