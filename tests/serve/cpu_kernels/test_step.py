"""A step in one call: its products against exact ones, and its outputs against vLLM's, step by step."""

from __future__ import annotations

import ctypes
import json
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

from serve.cpu_kernels import step

needs_kernels = pytest.mark.skipif(not step.available(), reason="no AVX-512 BF16 and VNNI, or no compiler")


def pack(weight: torch.Tensor, kind: int, scale: torch.Tensor | None = None, paired: int = 0) -> int:
    at = step._at
    return step.library().loradock_matrix(at(weight), *weight.shape, kind, 32, at(scale), None, paired)


def multiply(number: int, x: torch.Tensor, outputs: int) -> torch.Tensor:
    out = torch.full((x.shape[0], outputs), float("nan"))
    stride = ctypes.c_int64(x.stride(0))
    step.library().loradock_logits(number, step._at(x), stride, x.shape[0], step._at(out), ctypes.c_int64(outputs))
    return out


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 29, 200])
@pytest.mark.parametrize("outputs,inputs", [(48, 32), (208, 96), (1024, 1024)])
def test_products_are_the_exact_ones_up_to_their_rounding(rows, outputs, inputs):
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).bfloat16()
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    exact = x.double() @ weight.double().T
    got = multiply(pack(weight, step.BF16), x, outputs)
    assert (got - exact).abs().max() < 2**-7 * exact.abs().max()
    # int8 for groups of 32: each rounds to a half of the largest / 127.
    got = multiply(pack(weight, step.GROUP8), x, outputs)
    assert (got - exact).norm() < 0.012 * exact.norm()


@needs_kernels
def test_int8_products_are_those_of_dynamic_quantization_exactly():
    torch.manual_seed(0)
    x, weight = torch.randn(37, 96).bfloat16(), torch.randint(-127, 128, (80, 96), dtype=torch.int8)
    scale = torch.rand(80) * 0.01
    x_scale = x.float().abs().amax(dim=1, keepdim=True) / 127
    x8 = (x.float() / x_scale).round()
    exact = (x8 @ weight.float().T) * x_scale * scale
    got = multiply(pack(weight, step.CHANNEL8, scale), x, 80)
    apart = (got - exact).abs()
    assert apart.max() <= 2**-7 * exact.abs().max()
    # Where a half of an input is rounded the other way, its row's products all move a little.
    assert (apart > 2**-16 * exact.abs().max()).float().mean() < 0.1


@needs_kernels
def test_what_does_not_fit_the_blocks_is_not_packed():
    assert pack(torch.zeros(40, 64, dtype=torch.bfloat16), step.BF16) == -1
    assert pack(torch.zeros(48, 72, dtype=torch.bfloat16), step.BF16) == -1
    assert pack(torch.zeros(48, 80, dtype=torch.bfloat16), step.GROUP8) == -1
    assert pack(torch.zeros(48, 64, dtype=torch.bfloat16), step.BF16, paired=1) == -1


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("stepwise")
    command = [sys.executable, "-m", "tests.campaigns.stepwise", str(folder / "out.json"), str(folder)]
    environ = {**os.environ, "LORADOCK_LORA_KERNELS": "auto", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "out.json").read_text())


@needs_kernels
@pytest.mark.engine
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_every_step_is_vllms_up_to_rounding(steps, name):
    """One token and many, prompts cut into pieces, with and without adapters of several ranks."""
    seen = steps[name]
    fused = [step for step in seen if step["fused"]]
    rows = {step["rows"] for step in fused}
    assert len(fused) >= 20 and {1, 2, 5} <= rows
    if not torch.cpu._is_amx_tile_supported():
        assert len(fused) == len(seen) and 96 in rows
    # Two roads of bfloat16 through two layers; a wrong head, adapter or position is off by 1.
    assert max(step["worst"] for step in fused) < 0.2
    assert max(step["middle"] for step in fused) < 0.05
    assert max(step["logits"] for step in fused) < 2**-7
