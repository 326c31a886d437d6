"""Weights in 4 and 8 bits: their products against torch's with the same numbers, and how near rounded ones come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from vllm.scalar_type import scalar_types

from serve.cpu_kernels import build, packing
from serve.cpu_kernels.operators import packed_linear
from tests.serve.cpu_kernels.test_step import multiply, stepwise
from tests.support.quantized import packed

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")

SHAPES = [(48, 64, 32), (80, 576, 64), (80, 576, 192), (208, 208, 16), (208, 208, 0), (64, 1536, 128), (64, 1536, 0)]


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """What is multiplied with: 8 bits for each group of inputs."""
    parts = []
    for part in x.float().split(group, dim=1):
        top = part.abs().amax(dim=1, keepdim=True)
        by = torch.full_like(top, 127) / top  # `127 / top` takes the reciprocal first
        parts.append((part * by).round() * (top / 127))
    return torch.cat(parts, dim=1).double()


def checkpoint(layout: str, numbers: torch.Tensor, bits: int, scale: torch.Tensor, zero: torch.Tensor | None):
    """A layer of vLLM's as compressed-tensors or GPTQ fills it, and the kernel that vLLM chose for it."""
    outputs, inputs = numbers.shape
    turned = layout == "gptq"
    at = (
        {"input_dim": 0, "output_dim": 1, "packed_dim": 0}
        if turned
        else {"input_dim": 1, "output_dim": 0, "packed_dim": 1}
    )
    weight = packed(numbers.T if turned else numbers, bits, 0 if turned else 1)
    scales = (scale.T if turned else scale).contiguous()
    layer = SimpleNamespace(q=weight, s=scales, z=None, bias=torch.randn(outputs).bfloat16())
    for name, value in at.items():
        setattr(weight, name, value)
        setattr(scales, name, value)
    if zero is not None:
        layer.z = packed(zero, 4, 0)  # of AWQ too, once vLLM turned it
        layer.z.output_dim = 0
    kinds = {(4, True): scalar_types.uint4, (4, False): scalar_types.uint4b8, (8, False): scalar_types.uint8b128}
    groups = scale.shape[1]
    config = SimpleNamespace(
        zero_points=zero is not None,
        weight_type=kinds[bits, zero is not None],
        group_size=inputs // groups if groups > 1 else -1,
        partition_weight_shape=(inputs, outputs),
    )
    return layer, SimpleNamespace(config=config, w_q_name="q", w_s_name="s", w_zp_name="z")


@pytest.fixture
def any_layer(monkeypatch) -> None:
    monkeypatch.setattr(packing, "LinearBase", SimpleNamespace)


@pytest.mark.usefixtures("any_layer")
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_products_with_4_bits_are_those_of_the_numbers_in_the_checkpoint(outputs, inputs, group, points, layout):
    torch.manual_seed(group)
    groups = inputs // group if group else 1
    numbers = torch.randint(0, 16, (outputs, inputs))
    # Of either sign, as `loradock optimize` writes them.
    scale = ((torch.rand(outputs, groups) + 0.1) * torch.randn(outputs, groups).sign()).bfloat16()
    zero = torch.randint(0, 16, (outputs, groups)) if points else None
    layer, kernel = checkpoint(layout, numbers, 4, scale, zero)
    packing.integers(layer, kernel)
    assert layer.loradock_weights == (f"int4 g{group}" if group else "int4") + " with zero points" * points
    middle = torch.full((outputs, groups), 8) if zero is None else zero
    # Each group's distance from the middle is kept in bfloat16.
    offset = ((8 - middle) * scale.float()).bfloat16().double()
    spread = [each.repeat_interleave(inputs // groups, dim=1) for each in (scale.double(), offset)]
    dense = (numbers - 8) * spread[0] + spread[1]
    cut = {0: 128, 192: 96}.get(group, group)
    for rows in (1, 2, 5, 7, 29):
        x = torch.randn(rows, inputs).bfloat16()
        exact = rounded(x, cut) @ dense.T + layer.bias.double()
        got = multiply(layer.loradock_matrix, x, outputs)
        assert (got - exact).abs().max() < 1e-5 * exact.abs().max(), rows


@pytest.mark.usefixtures("any_layer")
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("groups", [1, 9])
def test_products_with_8_bits_are_those_of_the_numbers_in_the_checkpoint(groups, layout):
    torch.manual_seed(0)
    numbers = torch.randint(0, 256, (80, 576))
    scale = (torch.rand(80, groups) + 0.1).bfloat16()
    layer, kernel = checkpoint(layout, numbers, 8, scale, None)
    packing.integers(layer, kernel)
    assert layer.loradock_weights == ("int8 g64" if groups > 1 else "int8")
    dense = (numbers - 128) * scale.double().repeat_interleave(576 // groups, dim=1)
    x = torch.randn(13, 576).bfloat16()
    exact = rounded(x, 64 if groups > 1 else 128) @ dense.T + layer.bias.double()
    got = multiply(layer.loradock_matrix, x, 80)
    assert (got - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.usefixtures("any_layer")
@pytest.mark.parametrize("group", [24, 8])
def test_groups_that_do_not_fit_the_blocks_are_not_packed(group):
    scale = torch.ones(48, 96 // group).bfloat16()
    layer, kernel = checkpoint("gptq", torch.zeros(48, 96, dtype=torch.long), 4, scale, None)
    packing.integers(layer, kernel)
    assert not hasattr(layer, "loradock_matrix")


def dense(number: int, shape: torch.Size) -> torch.Tensor:
    """A packed matrix's numbers: a single 1 is exact in 8 bits."""
    return multiply(number, torch.eye(shape[1]).bfloat16(), shape[0]).T


@pytest.mark.parametrize("inputs", [576, 208])
def test_4_bits_from_bfloat16_are_nearer_than_to_the_largest(inputs):
    torch.manual_seed(0)
    weight = torch.randn(96, inputs).bfloat16()
    number = packing.matrix(weight, packing.GROUP4)
    assert packing.words(packing.GROUP4, number) == "int4 g32"
    apart = (dense(number, weight.shape) - weight.float()).square().sum()
    plain = 0.0
    for part in weight.float().split(32, dim=1):
        most = part.gather(1, part.abs().argmax(dim=1, keepdim=True))
        scale = most / -8  # as llama.cpp's Q4_0 has it
        plain += ((part / scale).round().clamp(-8, 7) * scale - part).square().sum()
    assert apart < 0.93 * plain
    x = torch.randn(3, inputs).bfloat16()
    exact = rounded(x, 128) @ dense(number, weight.shape).double().T
    assert (multiply(number, x, 96) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("inputs", [576, 208, 64])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_4_bits_with_scales_in_common_are_multiplied_the_same_in_prompts_and_alone(inputs, group):
    torch.manual_seed(0)
    weight = torch.randn(96, inputs).bfloat16() * torch.rand(96, 1).add(0.1).bfloat16()
    number = packing.matrix(weight, packing.GROUP4, group=group)
    assert packing.library().loradock_matrix_span(number) == min(128 // group, 8)
    x = torch.randn(1100, inputs).bfloat16() * torch.logspace(-3, 3, inputs).bfloat16()  # six passes
    together = multiply(number, x, 96)
    for row in (0, 150, 181, 182, 299, 512, 700, 1099):
        assert torch.equal(multiply(number, x[row : row + 1], 96)[0], together[row])


def test_4_bits_whose_scales_have_nothing_in_common_stay_what_they_are():
    torch.manual_seed(0)
    numbers, scales = torch.randint(-8, 8, (96, 18, 32)).float(), torch.rand(96, 18, 1) + 0.1
    numbers[:, :, 0] = -8
    weight = (numbers * scales.bfloat16().float()).flatten(1).bfloat16()
    number = packing.matrix(weight, packing.GROUP4)
    assert packing.library().loradock_matrix_span(number) == 1
    assert (dense(number, weight.shape) - weight.float()).norm() < 0.005 * weight.float().norm()


def test_weights_that_were_4_bits_with_offsets_once_stay_what_they_are():
    torch.manual_seed(0)
    numbers = torch.randint(0, 16, (96, 18, 32)).float()
    numbers[:, :, 0], numbers[:, :, 1] = 0, 15  # each group's least and largest, as rounding leaves them
    weight = (numbers * torch.rand(96, 18, 1) - torch.rand(96, 18, 1) * 9).flatten(1).bfloat16()
    number = packing.matrix(weight, packing.GROUP4)
    assert packing.words(packing.GROUP4, number) == "int4 g32 with offsets"
    apart = (dense(number, weight.shape) - weight.float()).norm()
    assert apart < 0.005 * weight.float().norm()


def test_a_gate_and_what_it_lets_through_lie_side_by_side_in_4_bits():
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    plain = dense(packing.matrix(weight, packing.GROUP4), weight.shape)
    paired = dense(packing.matrix(weight, packing.GROUP4, paired=True), weight.shape)
    order = torch.cat([torch.cat([torch.arange(i, i + 16), torch.arange(48 + i, 64 + i)]) for i in (0, 16, 32)])
    assert torch.equal(paired, plain[order])


FORMATS = {
    "pack-quantized g32": "int4 g32; output layer bfloat16",
    "pack-quantized g64 with zero points": "int4 g64 with zero points; output layer bfloat16",
    "gptq g64": "int4 g64; output layer bfloat16",
    "awq g64": "int4 g64 with zero points; output layer bfloat16",
    "w8a16": "int8; output layer bfloat16",
    "float8": "int8 g64; output layer bfloat16",
    "float8 in blocks": "int8 g64; output layer bfloat16",
    "int4": "int4 g32; output layer int8 g64",
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, list[dict]]:
    return stepwise("tests.campaigns.stepwise_formats", tmp_path_factory.mktemp("formats"))


@pytest.mark.engine
@pytest.mark.parametrize("name", FORMATS)
def test_every_step_of_every_format_is_vllms_up_to_rounding(steps, name):
    """One token and many, prompts cut into pieces, with and without adapters of several ranks."""
    fused = [step for step in steps[name] if step["fused"]]
    assert len(fused) >= 20 and {1, 2, 5} <= {step["rows"] for step in fused}
    assert {step["weights"] for step in fused} == {FORMATS[name]}
    # Activations are rounded to 8 bits here alone; vLLM's own float8 rounds them to 4.
    more = 3 if name == "float8" else 1
    assert max(step["worst"] for step in fused) < 0.15 * more
    assert max(step["middle"] for step in fused) < 0.05 * more
    assert max(step["logits"] for step in fused) < (0.03 if name == "int4" else 2**-7)


@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int8 for each output", "int4"])
def test_the_squares_of_rows_are_those_of_the_weights_that_are_multiplied(kind, paired):
    torch.manual_seed(0)
    inputs, outputs = 192, 96
    weight, scale = torch.randn(outputs, inputs).bfloat16(), None
    if kind == "int8 for each output":
        weight, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) + 0.5
    kinds = {"bfloat16": packing.BF16, "int8": packing.GROUP8, "int4": packing.GROUP4}
    number = packing.matrix(weight, kinds.get(kind, packing.CHANNEL8), scale, paired=paired)
    multiplied = packed_linear(torch.eye(inputs).bfloat16(), number, outputs).float()
    squares = torch.empty(outputs)
    assert build.library().loradock_row_squares(number, packing.at(squares)) == 0
    torch.testing.assert_close(squares, multiplied.square().sum(0), rtol=0.01, atol=0)
