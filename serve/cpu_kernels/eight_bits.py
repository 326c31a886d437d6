"""vLLM's layers over packed 8-bit weights with 16-bit activations (W8A16), for which vLLM has no kernel on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from serve.cpu_kernels import packing
from serve.cpu_kernels.operators import packed_linear


class PackedLinearKernel(MPLinearKernel):
    """Weights are multiplied where the fused step reads them, with activations in 8 bits for up to 128 inputs each."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        inputs, outputs = c.partition_weight_shape
        if c.weight_type != scalar_types.uint8b128 or c.zero_points:
            return False, "loradock's kernel takes 8 bits without zero points"
        if c.act_type != torch.bfloat16:
            return False, "loradock's kernel takes bfloat16: serve with --dtype bfloat16"
        if inputs % 16 or outputs % 16 or (c.group_size > 0 and c.group_size % 16):
            return False, f"loradock's kernel takes sizes and groups in multiples of 16, not {inputs} x {outputs}"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packing.integers(layer, self)
        if not hasattr(layer, "loradock_matrix"):
            reason = getattr(layer, "loradock_refused", "its layout is not known")
            raise ValueError(f"8-bit weights of {getattr(layer, 'prefix', 'a layer')} cannot be packed: {reason}")
        packed = getattr(layer, self.w_q_name)
        packed.data = packed.data.new_empty(0)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = packed_linear(x, layer.loradock_matrix, self.config.partition_weight_shape[1])
        own = getattr(layer, "bias", None)
        return y if bias is not None or own is None else y - own  # it is packed with the weights


def register() -> None:
    """Let vLLM choose it where its own kernels do not know the weights."""
    from vllm.model_executor.kernels import linear

    assert current_platform.is_cpu()
    if PackedLinearKernel not in linear._POSSIBLE_KERNELS[PlatformEnum.CPU]:
        register_linear_kernel(PackedLinearKernel, PlatformEnum.CPU)
