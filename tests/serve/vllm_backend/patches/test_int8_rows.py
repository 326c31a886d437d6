"""With AMX vLLM's int8 kernel takes rows alone; models that run by transformers' code have sequences of them."""

from __future__ import annotations

import pytest
import torch

from serve.cpu_kernels.install import multiply_int8_rows


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 3, 8), (2, 3, 8)])
def test_a_product_has_the_shape_of_its_input(shape):
    layer, x = torch.nn.Linear(8, 5), torch.randn(shape)

    def rows_alone(kernel: object, layer: torch.nn.Module, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        assert rows.dim() == 2
        return torch.nn.functional.linear(rows, layer.weight, bias)

    made = multiply_int8_rows(rows_alone, None, layer, x, layer.bias)
    assert made.shape == (*shape[:-1], 5)
    assert torch.allclose(made, layer(x), atol=1e-6)
