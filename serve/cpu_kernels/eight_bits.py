"""vLLM's layers over packed 8-bit weights: W8A16, and FP8 in blocks. vLLM has a kernel for the latter alone, with AMX.

Weights are multiplied where the fused step reads them, with activations in 8 bits for up to 128 inputs each.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel, MPLinearKernel, MPLinearLayerConfig
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from serve.cpu_kernels import packing
from serve.cpu_kernels.operators import packed_linear


class PackedIntegers(MPLinearKernel):
    """W8A16 of compressed-tensors."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type != scalar_types.uint8b128 or c.zero_points:
            return False, "loradock's kernel takes 8 bits without zero points"
        if c.group_size > 0 and c.group_size % 16:
            return False, f"loradock's kernel takes groups of multiples of 16, not of {c.group_size}"
        return _fits(c.partition_weight_shape, c.act_type)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packing.integers(layer, self)
        _emptied(layer, self.w_q_name)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _product(layer, x, bias, self.config.partition_weight_shape[1])


class PackedBlocks(Fp8BlockScaledMMLinearKernel):
    """FP8 with a scale for each block of rows and columns."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return _fits(config.weight_shape, config.out_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        params = self._get_layer_params(layer)
        rows, columns = params.weight.shape
        scale = params.block_scale.float().repeat_interleave(self.weight_group_shape.row, 0)[:rows]
        packing.float8(layer, params.weight, scale.repeat_interleave(self.weight_group_shape.col, 1)[:, :columns])
        _emptied(layer, params.WEIGHT)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        return _product(layer, x, bias, self.config.weight_shape[0])

    def apply_block_scaled_mm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("the weights are packed")


def register(mla: bool) -> None:
    """Let vLLM choose them: before its own one for blocks, since the fused step does not know what that packs; but
    where attention is latent (MLA), which reads weights that must not be packed."""
    integers: list[Any] = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if PackedIntegers not in integers:
        integers.append(PackedIntegers)
    blocks: list[Any] = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if PackedBlocks not in blocks:
        blocks.insert(len(blocks) if mla else 0, PackedBlocks)


def _fits(shape: tuple[int, int], dtype: torch.dtype | None) -> tuple[bool, str | None]:
    if dtype != torch.bfloat16:
        return False, "loradock's kernel takes bfloat16: serve with --dtype bfloat16"
    if shape[0] % 16 or shape[1] % 16:
        return False, f"loradock's kernel takes sizes in multiples of 16, not {shape[0]} x {shape[1]}"
    return True, None


def _emptied(layer: Any, name: str) -> None:
    """The layer's own copy is given up, once there is a packed one."""
    if not hasattr(layer, "loradock_matrix"):
        reason = getattr(layer, "loradock_refused", "their layout is not known")
        raise ValueError(f"8-bit weights of {getattr(layer, 'prefix', 'a layer')} cannot be packed: {reason}")
    weight = getattr(layer, name)
    weight.data = weight.data.new_empty(0)


def _product(layer: Any, x: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    y = packed_linear(x, layer.loradock_matrix, outputs)
    own = getattr(layer, "bias", None)
    return y if bias is not None or own is None else y - own  # it is packed with the weights
