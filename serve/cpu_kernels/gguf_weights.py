"""vLLM's quantization method for weights that stay as they are in a GGUF file.

What its layers are is in `gguf_layers`, which is imported where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from serve.cpu_kernels.build import library
from serve.models.gguf.kept import METHOD


def register() -> None:
    """Let vLLM read checkpoints with such weights, in this process."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(GGUFWeights)


class GGUFWeights(QuantizationConfig):
    """Which modules' weights are a file's, by their type."""

    def __init__(self, types: Mapping[str, str], tied: bool) -> None:
        super().__init__()
        self.types = types
        self.tied = tied  # the output layer is the embedding

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GGUFWeights:
        if library() is None:
            raise ValueError(
                "a GGUF file's weights are multiplied as they are by loradock's kernels, and there are none here: "
                "install g++, or serve the file anew"
            )
        return cls(config["types"], config["tied"])

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        from serve.cpu_kernels import gguf_layers

        return gguf_layers.method(layer, prefix, self.types, self.tied)
