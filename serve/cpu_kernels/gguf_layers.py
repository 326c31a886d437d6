"""vLLM's layers over matrices that are packed from a GGUF file's own blocks.

A layer takes its tensors as rows of bytes (`serve.models.gguf.conversion`) and packs them when the last
of them was read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from serve.cpu_kernels import one_copy, packing
from serve.cpu_kernels.build import library
from serve.cpu_kernels.operators import packed_linear
from serve.models.gguf.file import TYPE_NUMBERS
from serve.models.gguf.kept import modules_of


def method(layer: torch.nn.Module, prefix: str, types: Mapping[str, str], tied: bool) -> Any:
    """How a layer has its weights. types: of the checkpoint's modules whose weights are kept."""
    if isinstance(layer, VocabParallelEmbedding):  # whose prefix not every model says
        is_head = isinstance(layer, ParallelLMHead)
        kind = types.get("lm_head" if is_head else "model.embed_tokens")
        if is_head and tied and "model.embed_tokens" in types:
            return Blocks([])  # it is the embedding's matrix
        return Blocks([kind]) if kind else None
    if not isinstance(layer, LinearBase):
        return None
    modules = [module for module in modules_of(prefix, types) if module in types]
    return Blocks([types[module] for module in modules]) if modules else UnquantizedLinearMethod()


class Blocks(LinearMethodBase):
    """Of one layer. types: of the tensors of which it is made, in order."""

    def __init__(self, types: list[str]) -> None:
        self.types = types
        self.rows: dict[Any, torch.Tensor] = {}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError("a GGUF file's weights as they are cannot be spread over several workers")
        # vLLM asks for its type and device; it stays empty, as of all layers whose weights are packed.
        weight = Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        weight.weight_loader = partial(self.take, layer)
        layer.register_parameter("weight", weight)
        layer.loradock_outputs = output_size

    def take(self, layer: Any, parameter: Any, rows: torch.Tensor, shard: Any = None) -> None:
        """Of one tensor, (outputs, bytes)."""
        self.rows[shard] = rows
        # A bias is packed with them, and may be read later.
        if len(self.rows) == len(self.types) and getattr(layer, "bias", None) is None:
            self.pack(layer)

    def pack(self, layer: Any) -> None:
        kernels = library()
        assert kernels is not None
        order = [shard for shard in ("q", "k", "v", 0, 1, None) if shard in self.rows]
        parts = [self.rows.pop(shard).contiguous() for shard in order]
        count = len(parts)
        is_linear = packing.is_linear(layer)
        number = kernels.loradock_matrix_ggml(
            (ctypes.c_void_p * count)(*(part.data_ptr() for part in parts)),
            (ctypes.c_int * count)(*(TYPE_NUMBERS[kind] for kind in self.types)),
            (ctypes.c_int * count)(*(part.shape[0] for part in parts)),
            count,
            layer.loradock_outputs,
            layer.input_size,
            packing.at(getattr(layer, "bias", None)),
            int(is_linear and packing.is_paired(layer)),
        )
        if number < 0:
            raise ValueError(f"{getattr(layer, 'prefix', 'a layer')} cannot be packed from {', '.join(self.types)}")
        layer.loradock_matrix = number
        layer.loradock_weights = ", ".join(dict.fromkeys(self.types))

    def process_weights_after_loading(self, layer: Any) -> None:
        if (tied := getattr(layer, "loradock_tied", None)) is not None:
            layer.loradock_matrix, layer.loradock_weights = tied[0].loradock_matrix, tied[0].loradock_weights
        elif not hasattr(layer, "loradock_matrix"):
            self.pack(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = packed_linear(x, layer.loradock_matrix, layer.loradock_outputs)
        own = getattr(layer, "bias", None)
        return y if bias is not None or own is None else y - own  # it is packed with the weights

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return one_copy.rows(layer, ids)

    def tie_weights(self, layer: Any, embedding: Any) -> Any:
        """The output layer is the embedding's matrix, once there is one."""
        layer.loradock_tied = (embedding,)  # in a tuple, so that it is no module of the layer's
        return layer
