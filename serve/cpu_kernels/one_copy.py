"""One copy of the weights: vLLM's layers multiply with what was packed for the fused step, and give their own back.

`take` marks the layers of a model that the step takes, when it is built and before its weights are read. As each of
them is loaded it is packed, and its weights are freed at once: never are there two copies. Steps that go vLLM's way
call `loradock::packed_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from serve.cpu_kernels import packing, pages
from serve.cpu_kernels.build import library
from serve.cpu_kernels.operators import packed_linear

RELEASED = 64 << 20  # bytes that are freed before the allocator is asked to give them back
_freed = 0


def take(model: Any, embedding: Any, head: Any, keep: bool = False) -> None:
    """Have the layers of this model packed as they are loaded; `keep`: vLLM's copy stays beside, to compare with it."""
    layers = [module for module in model.modules() if packing.is_linear(module)]
    for layer in (*layers, embedding, head):
        layer.loradock_keep = keep
    head.loradock_embedding = (embedding,)


def put(method: Any, name: str, ours: Callable[..., Any]) -> None:
    """Have `ours` in front of this method of this one object's class."""
    setattr(method, name, partial(ours, getattr(type(method), name), method))


def taken(layer: Any) -> bool:
    return hasattr(layer, "loradock_keep")


def when_loaded(layer: Any, pack: Callable[[], object]) -> None:
    """Call `pack` as soon as the last of a layer's weights has been read into it, while others are yet to come.

    Where packed weights are smaller, the memory that the model takes never is that of the larger ones.
    """
    parameters = list(layer.parameters(recurse=False))
    missing = sum(parameter.numel() for parameter in parameters)

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(parameter: Any, read: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal missing
            result = original(parameter, read, *args, **kwargs)
            missing -= read.numel()
            if missing == 0:
                pack()
            return result

        return load

    if all(hasattr(parameter, "weight_loader") for parameter in parameters):
        for parameter in parameters:
            parameter.weight_loader = counting(parameter.weight_loader)


def replace(layer: Any, name: str = "weight") -> bool:
    """Free a packed layer's own weights; whether vLLM now has to multiply with the packed ones."""
    number = getattr(layer, "loradock_matrix", -1)
    if number < 0 or not taken(layer) or layer.loradock_keep:
        return False
    layer.cpu_linear = partial(multiply, layer)
    kernels = library()
    assert kernels is not None
    (embedding,) = getattr(layer, "loradock_embedding", (None,))
    if embedding is not None and embedding.weight is layer.weight:
        if not kernels.loradock_unpacks(number):
            return True  # the embedding is looked up in what the matrix was rounded from
        embedding.loradock_matrix = number
    free(getattr(layer, name))
    return True


def replaced(layer: Any) -> bool:
    """Whether vLLM multiplies with the packed weights of this layer, or looks an embedding up in the output layer's."""
    return hasattr(layer, "loradock_matrix") and layer.weight.numel() == 0


def multiply(layer: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    """What vLLM's methods for weights compute, the bias included; it is packed with the weights."""
    kernels = library()
    assert kernels is not None
    return packed_linear(x, layer.loradock_matrix, kernels.loradock_matrix_outputs(layer.loradock_matrix))


def free(weight: torch.nn.Parameter) -> None:
    """Give the memory of weights back, its allocator's too. They stay of their type, and empty, as vLLM leaves them."""
    global _freed
    _freed += weight.nbytes
    weight.data = weight.data.new_empty(0)
    if _freed > RELEASED:
        _freed = 0
        pages.release()


def rows(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    """The rows of an embedding that is the output layer's packed matrix."""
    kernels = library()
    assert kernels is not None
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty((flat.shape[0], embedding.embedding_dim), dtype=torch.bfloat16)
    kernels.loradock_rows(embedding.loradock_matrix, packing.at(flat), flat.shape[0], packing.at(out))
    return out.view(*ids.shape, embedding.embedding_dim)
