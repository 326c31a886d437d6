"""A GGUF file's weights in its own blocks: what they are to the bit, their products, and the memory they take."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build, packing
from serve.models.gguf.kept import SCALES
from tests.serve.cpu_kernels.test_packing import rounded
from tests.serve.cpu_kernels.test_step import multiply
from tests.support.gguf_files import packed_blocks
from tests.support.gguf_files import scaled_blocks as blocks

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")

TYPES = tuple(SCALES)
# Those with 2 and 3 bits take 4 here.
WIDER = {"Q2_K": 2.0, "Q3_K": 1.35}


def dense(kind: str, raw: np.ndarray) -> torch.Tensor:
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def rows_of(number: int, count: int, inputs: int) -> torch.Tensor:
    which, out = torch.arange(count), torch.empty(count, inputs)
    build.library().loradock_ggml_rows(number, packing.at(which), count, packing.at(out))
    return out


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_ggmls_to_the_bit_and_take_the_files_room(kind):
    raw = blocks(kind, (96, 512), np.random.default_rng(0))
    number = packed_blocks([(kind, raw)], 96, 512)
    assert torch.equal(rows_of(number, 96, 512), dense(kind, raw))
    size = build.library().loradock_matrix_bytes
    size.restype = ctypes.c_int64
    assert raw.nbytes <= size(number) <= WIDER.get(kind, 1.03) * raw.nbytes


@pytest.mark.parametrize("kind", TYPES)
def test_products_are_those_of_the_files_weights_and_of_inputs_in_8_bits(kind):
    torch.manual_seed(0)
    raw = blocks(kind, (80, 768), np.random.default_rng(1))
    bias = torch.randn(80).bfloat16()
    number = packed_blocks([(kind, raw)], 80, 768, bias)
    weight = dense(kind, raw).double()
    x = torch.randn(200, 768).bfloat16()
    x[0], x[1], x[2] = 1, -1, 0  # sums in 16 bits have to hold the largest
    exact = rounded(x, 32).nan_to_num() @ weight.T + bias.double()
    each = torch.cat([multiply(number, row, 80) for row in x[:29].split(1)])
    for rows in (1, 2, 3, 5, 7, 12, 16, 29, 200):
        got = multiply(number, x[:rows], 80)
        assert (got - exact[:rows]).abs().max() < 1e-5 * exact.abs().max(), rows
        assert torch.equal(got[:29], each[:rows]), "an answer depends on what it is computed with"


def test_a_layer_of_tensors_of_several_types_is_one_matrix():
    random, parts = np.random.default_rng(2), []
    for kind, outputs in (("Q4_K", 64), ("Q5_0", 32), ("Q6_K", 32), ("Q8_0", 16)):
        parts.append((kind, blocks(kind, (outputs, 256), random)))
    number = packed_blocks(parts, 144, 256)
    weight = torch.cat([dense(kind, raw) for kind, raw in parts])
    assert torch.equal(rows_of(number, 144, 256), weight)
    x = torch.randn(40, 256).bfloat16()
    exact = rounded(x, 32) @ weight.double().T
    for rows in (1, 3, 16, 40):
        assert (multiply(number, x[:rows], 144) - exact[:rows]).abs().max() < 1e-5 * exact.abs().max()


def test_a_gate_lies_beside_what_it_opens_and_missing_rows_are_zeros():
    random = np.random.default_rng(3)
    gate, up = blocks("Q4_K", (48, 256), random), blocks("Q4_K", (48, 256), random)
    paired = packed_blocks([("Q4_K", gate), ("Q4_K", up)], 96, 256, paired=True)
    assert torch.equal(rows_of(paired, 96, 256), torch.cat([dense("Q4_K", gate), dense("Q4_K", up)]))
    filled = packed_blocks([("Q4_K", gate)], 64, 256)
    x = torch.randn(3, 256).bfloat16()
    assert not multiply(filled, x, 64)[:, 48:].any() and multiply(filled, x, 64)[:, 1:48].all()


def test_what_cannot_be_one_matrix_is_said():
    random = np.random.default_rng(4)
    apart = [("Q4_K", blocks("Q4_K", (16, 256), random)), ("Q6_K", blocks("Q6_K", (16, 256), random))]
    assert packed_blocks(apart, 32, 256) == -1  # 32 rows of two types
    assert packed_blocks([("Q8_0", blocks("Q8_0", (24, 64), random))], 24, 64) == -1
    assert packed_blocks([("Q4_K", blocks("Q4_K", (32, 256), random))], 32, 128) == -1
    assert build.library().loradock_ggml_row_bytes(1, 256) == 0  # F16
