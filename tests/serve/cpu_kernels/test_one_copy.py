"""What vLLM's layers compute with packed weights, and when these are packed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build, one_copy, packing

needs_kernels = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")


def pack(weight: torch.Tensor, kind: int, scale: torch.Tensor | None = None, paired: bool = False) -> int:
    return packing.matrix(weight, kind, scale, paired=paired, group=32)


@needs_kernels
def test_an_embedding_is_looked_up_in_the_packed_output_layer():
    weight = torch.randn(336, 96).bfloat16()
    layer = SimpleNamespace(loradock_matrix=pack(weight, packing.BF16), embedding_dim=96)
    ids = torch.tensor([[0, 31, 32], [335, 17, 0]])
    assert torch.equal(one_copy.rows(layer, ids), weight[ids])


@needs_kernels
@pytest.mark.parametrize("kind", [packing.BF16, packing.CHANNEL8, packing.GROUP8, packing.GROUP4])
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(("outputs", "paired"), [(96, False), (80, False), (96, True)])
def test_a_layer_by_itself_multiplies_with_what_is_packed(kind, rows, outputs, paired):
    torch.manual_seed(rows)
    x = torch.randn(rows, 2, 64).bfloat16()[:, 1]  # rows that lie apart
    weight, scale = (torch.randn(outputs, 64) * 0.1).bfloat16(), None
    exact_weight = weight.double()
    if kind == packing.CHANNEL8:
        weight, scale = torch.randint(-127, 128, (outputs, 64), dtype=torch.int8), torch.rand(outputs) * 0.01
        exact_weight = weight.double() * scale[:, None].double()
    layer = SimpleNamespace(loradock_matrix=pack(weight, kind, scale, paired))
    exact = x.double() @ exact_weight.T
    got = one_copy.multiply(layer, x.unsqueeze(0))
    assert got.shape == (1, rows, outputs) and got.dtype == torch.bfloat16
    assert (got[0] - exact).norm() < (0.12 if kind == packing.GROUP4 else 0.015) * exact.norm()


def test_a_layer_is_packed_when_the_last_of_its_weights_is_read():
    layer = torch.nn.Linear(4, 6)
    for parameter in layer.parameters():
        parameter.weight_loader = lambda parameter, read, part=0: parameter.data[part : part + len(read)].copy_(read)
    seen: list[torch.Tensor] = []
    one_copy.when_loaded(layer, lambda: seen.append(layer.weight.detach().clone()))
    layer.weight.weight_loader(layer.weight, torch.ones(2, 4), 0)
    layer.bias.weight_loader(layer.bias, torch.ones(6))
    assert not seen
    layer.weight.weight_loader(layer.weight, torch.ones(4, 4), part=2)
    assert len(seen) == 1 and seen[0].eq(1).all()
