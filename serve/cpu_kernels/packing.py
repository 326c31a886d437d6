"""Weights of a layer, packed for the fused step: one function for each format, called once while the layer is loaded.

It leaves on the layer what it made: `loradock_matrix`, the packed matrix's number, and `loradock_weights`, its format
in words; or `loradock_refused`, why not.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

from serve.cpu_kernels.build import library
from serve.cpu_kernels.install import WEIGHTS

BF16, CHANNEL8, GROUP8, GROUP4 = range(4)
# Inputs that share a scale in weights that are rounded here.
GROUPS = {BF16: 16, GROUP8: 64, GROUP4: 32}


def floats(layer: Any, weight: torch.Tensor, otherwise: int = BF16) -> None:
    """bfloat16 (outputs, inputs), in the bits that the setting asks for, or else in these."""
    kind = {"int8": GROUP8, "int4": GROUP4}.get(os.environ.get(WEIGHTS, ""), otherwise)
    if _fits(layer, weight, torch.bfloat16):
        number = matrix(weight, kind, bias=_bias(layer), paired=is_paired(layer))
        _keep(layer, number, words(kind, number))


def channels(layer: Any, scale: torch.Tensor) -> None:
    """int8 (outputs, inputs) with a scale for each output."""
    if _fits(layer, layer.weight, torch.int8):
        number = matrix(layer.weight, CHANNEL8, scale, _bias(layer), is_paired(layer))
        _keep(layer, number, "int8")


def float8(layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """float8 (outputs, inputs) with scales, one for all or that spread over it: 8 bits, but int8 for groups of inputs.

    Rounding them once more moves weights by a quarter of what float8 did.
    """
    if isinstance(layer, LinearBase):
        floats(layer, (weight.float() * scale.float()).bfloat16(), GROUP8)


def integers(layer: Any, kernel: Any) -> None:
    """4 or 8 bits in int32 with scales for groups, as compressed-tensors, GPTQ and (once vLLM turned it) AWQ have them.

    `kernel` is vLLM's for the layer, before it turns the weights for itself.
    """
    config = kernel.config
    packed = getattr(layer, kernel.w_q_name)
    scale = getattr(layer, kernel.w_s_name)
    if packed.input_dim != packed.packed_dim or not _fits(layer, packed, torch.int32) or scale.dtype != torch.bfloat16:
        return
    size = packed.shape[packed.output_dim], config.partition_weight_shape[0]
    scale = _by_output(scale.data, scale.output_dim)
    zero = None
    if config.zero_points:
        zeros = getattr(layer, kernel.w_zp_name)
        numbers = unpack_quantized_values_into_int32(zeros.data, config.weight_type, zeros.output_dim)
        zero = _by_output(numbers.to(torch.uint8), zeros.output_dim)
    bits = config.weight_type.size_bits
    group = config.group_size if config.group_size > 0 else size[1]
    number = library().loradock_matrix_integers(  # type: ignore[union-attr]
        at(packed),
        (ctypes.c_int64 * 2)(packed.stride(packed.output_dim), packed.stride(packed.input_dim)),
        bits,
        at(scale),
        at(zero),
        (ctypes.c_int64 * 2)(*scale.stride()),
        *size,
        group,
        at(_bias(layer)),
        int(is_paired(layer)),
    )
    named = f"int{bits} g{group}" if group < size[1] else f"int{bits}"
    _keep(layer, number, named + (" with zero points" if config.zero_points else ""))


def matrix(
    weight: torch.Tensor,
    kind: int,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    paired: bool = False,
    group: int = 0,
) -> int:
    """The number of a packed matrix, -1 where its sizes do not allow it."""
    kernels = library()
    assert kernels is not None
    group = group or GROUPS.get(kind, 16)
    number = kernels.loradock_matrix(at(weight), *weight.shape, kind, group, at(scale), at(bias), int(paired))
    return int(number)


def words(kind: int, number: int) -> str:
    """The format of weights that were rounded here, as an operator reads it."""
    named = {BF16: "bfloat16", GROUP8: f"int8 g{GROUPS[GROUP8]}", GROUP4: f"int4 g{GROUPS[GROUP4]}"}[kind]
    kernels = library()
    offsets = kind == GROUP4 and number >= 0 and kernels is not None and kernels.loradock_matrix_offsets(number)
    return named + (" with offsets" if offsets else "")


def shrinks() -> bool:
    """Whether bfloat16 weights become fewer bits."""
    return os.environ.get(WEIGHTS) in ("int8", "int4")


def head(layer: Any) -> None:
    """The output layer, which is the same as the embedding in many models: 8 bits, where fewer are asked for too."""
    kind = GROUP8 if shrinks() else BF16
    number = matrix(layer.weight, kind)
    _keep(layer, number, words(kind, number))


def is_linear(module: Any) -> bool:
    """Whether it is one of vLLM's layers of a matrix."""
    return isinstance(module, LinearBase)


def is_paired(layer: Any) -> bool:
    """Whether the first half of the outputs is the gate of the second."""
    return isinstance(layer, MergedColumnParallelLinear) and len(layer.output_sizes) == 2


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _fits(layer: Any, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether this is a layer's whole matrix, of this type."""
    if library() is None or not isinstance(layer, LinearBase) or weight.is_meta:
        return False
    bias = _bias(layer)
    if weight.ndim != 2 or weight.dtype != dtype or not weight.is_contiguous():
        layer.loradock_refused = f"its weights are {weight.dtype}"
    elif bias is not None and bias.dtype != torch.bfloat16:
        layer.loradock_refused = "its bias is not bfloat16"
    elif is_paired(layer) and layer.output_sizes[0] != layer.output_sizes[1]:
        layer.loradock_refused = "its halves differ in size"
    elif bias is not None and getattr(layer, "skip_bias_add", False):
        layer.loradock_refused = "its bias is added later"
    else:
        return True
    return False


def _bias(layer: Any) -> torch.Tensor | None:
    return getattr(layer, "bias", None)


def _by_output(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    return (tensor if dimension == 0 else tensor.T).contiguous()


def _keep(layer: Any, number: int, named: str) -> None:
    if number >= 0:
        layer.loradock_matrix, layer.loradock_weights = number, named
    else:
        layer.loradock_refused = f"its sizes, or {named}'s groups, are no multiples of 16"
