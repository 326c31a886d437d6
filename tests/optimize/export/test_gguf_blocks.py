"""Weights in ggml's blocks: what the `gguf` package reads of them is near what they were."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from optimize.export.gguf_blocks import CALIBRATED, blocks, calibrated, kind_of
from optimize.steps.quantize.gptq import damped

# Of the squared weights, the part that is lost at most: normal weights, measured .0069, .0050, .00027, .00002.
LOST = {"Q4_0": 0.011, "Q4_K": 0.0062, "Q6_K": 0.0005, "Q8_0": 0.00006}


def back(weights: torch.Tensor, kind: str) -> torch.Tensor:
    values = gguf.dequantize(blocks(weights, kind), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values)).float().view(weights.shape)


@pytest.mark.parametrize("kind", LOST)
def test_little_is_lost(kind):
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    weights[3] = 0
    weights[5] += 0.05  # all of one sign
    lost = (back(weights, kind) - weights).square().sum() / weights.square().sum()
    assert 0 < lost < LOST[kind]
    assert not back(weights, kind)[3].any()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_what_is_on_the_grid_stays_there(kind):
    once = back(torch.randn(16, 512, generator=torch.Generator().manual_seed(1)), kind)
    again = back(once, kind)
    assert (again - once).square().sum() < 2e-3 * once.square().sum()


def test_a_matrix_gets_a_type_that_its_inputs_allow():
    assert [kind_of("Q4_K", inputs) for inputs in (512, 896, 40)] == ["Q4_K", "Q5_0", "F16"]
    assert [kind_of("Q6_K", inputs) for inputs in (512, 576)] == ["Q6_K", "Q8_0"]
    assert kind_of("BF16", 40) == "BF16"


@pytest.mark.parametrize("kind", CALIBRATED)
def test_calibrated_outputs_are_nearer_than_those_of_weights_rounded_by_themselves(kind):
    random = torch.Generator().manual_seed(2)
    weights = torch.randn(64, 512, generator=random) * 0.02
    weights[3, :256] = 0
    mixed = torch.randn(512, 512, generator=random) / 512**0.5 + torch.eye(512)
    # Some inputs are louder than others, and all of them go together.
    inputs = torch.randn(4096, 512, generator=random) @ mixed * torch.rand(512, generator=random).exp()
    hessian = inputs.T @ inputs
    packed = calibrated(weights, kind, damped(hessian.clone(), len(inputs)), hessian.diagonal())
    plain = blocks(weights, kind)
    assert packed.shape == plain.shape
    label = gguf.GGMLQuantizationType[kind]
    got, other = (
        torch.from_numpy(np.array(gguf.dequantize(part, label))).view(weights.shape) for part in (packed, plain)
    )
    assert _lost(inputs, got, weights) < 0.8 * _lost(inputs, other, weights)


def _lost(inputs: torch.Tensor, rounded: torch.Tensor, weights: torch.Tensor) -> float:
    return float((inputs @ (rounded - weights).T).square().sum())
