"""Quantized checkpoints as others lay them out: compressed-tensors' packed integers and float8, GPTQ and AWQ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How each linear layer of a model is rounded; `group` 0 is a whole row."""

    layout: str  # pack-quantized, float-quantized, fp8 (blocks), gptq, awq, or dense: the rounded numbers in bfloat16
    bits: int = 4
    group: int = 0
    points: bool = False  # zero points

    def config(self) -> dict[str, Any]:
        """Of config.json."""
        if self.layout == "gptq":
            return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group or -1, "desc_act": False,
                    "sym": True, "lm_head": False, "checkpoint_format": "gptq"}  # fmt: skip
        if self.layout == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": self.points,
                    "version": "gemm"}  # fmt: skip
        if self.layout == "fp8":
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [self.group, self.group],
            }
        float8 = self.layout == "float-quantized"
        kind = {"num_bits": 8 if float8 else self.bits, "type": "float" if float8 else "int"}
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        inputs = {**kind, "symmetric": True, "strategy": "token", "dynamic": True} if float8 else None
        group = {
            "targets": ["Linear"],
            "weights": {**kind, **strategy, "symmetric": not self.points, "dynamic": False},
            "input_activations": inputs,
        }
        return {"quant_method": "compressed-tensors", "format": self.layout, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip

    def rounded(self, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The tensors that stand for one weight (outputs, inputs), by their last names."""
        outputs, inputs = weight.shape
        group = self.group or inputs
        if self.layout == "float-quantized":
            scale = weight.float().abs().amax(1, keepdim=True) / 448
            return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale.bfloat16()}
        if self.layout == "fp8":
            return _blocks(weight.float(), group)
        parts = weight.float().view(outputs, -1, group)
        middle, most = 1 << (self.bits - 1), (1 << self.bits) - 1
        if self.points:
            low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
            scale = ((high - low) / most).bfloat16()
            zero = (-low / scale.float()).round().clamp(0, most).long()
        else:
            scale = (parts.abs().amax(2) / (middle - 1)).bfloat16()
            zero = torch.full(scale.shape, middle)
        numbers = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, most).long()
        if self.layout == "dense":
            return {"weight": ((numbers - zero[..., None]) * scale.float()[..., None]).view(outputs, inputs).bfloat16()}
        return self._packed(numbers.view(outputs, inputs), scale, zero)

    def _packed(self, numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if self.layout == "gptq":  # whose zeros are one less than they are
            zeros = packed(zero.T - 1, self.bits, 1)
            places = torch.arange(numbers.shape[1], dtype=torch.int32) // (self.group or numbers.shape[1])
            return {
                "qweight": packed(numbers.T, self.bits, 0),
                "qzeros": zeros,
                "scales": scale.T.half(),
                "g_idx": places,
            }
        if self.layout == "awq":
            return {
                "qweight": packed(_awq(numbers.T), 4, 1),
                "qzeros": packed(_awq(zero.T), 4, 1),
                "scales": scale.T.half(),
            }
        made = {"weight_packed": packed(numbers, self.bits, 1), "weight_scale": scale}
        made["weight_shape"] = torch.tensor(numbers.shape)
        return made | ({"weight_zero_point": packed(zero, self.bits, 0)} if self.points else {})


def _blocks(weight: torch.Tensor, size: int) -> Mapping[str, torch.Tensor]:
    """float8 with a scale for each block of so many rows and columns."""
    scales = torch.stack(
        [torch.stack([part.abs().amax() for part in rows.split(size, 1)]) for rows in weight.split(size, 0)]
    )
    spread = (scales / 448).repeat_interleave(size, 0)[: weight.shape[0]].repeat_interleave(size, 1)
    numbers = (weight / spread[:, : weight.shape[1]]).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales / 448}


def packed(numbers: torch.Tensor, bits: int, dimension: int) -> torch.Tensor:
    """The lowest first in int32, along the dimension."""
    split = numbers.long().unflatten(dimension, (-1, 32 // bits)).movedim(dimension + 1, -1)
    whole = (split << torch.arange(0, 32, bits)).sum(-1)
    return (whole - (whole >= 2**31) * 2**32).to(torch.int32).contiguous()


def _awq(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.unflatten(1, (-1, 8))[..., torch.tensor(AWQ_ORDER)].flatten(1)


def save(model: Any, scheme: Scheme, folder: Path) -> Path:
    """A model of transformers', its linear layers rounded."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            made = scheme.rounded(weight)
            tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in made.items()}
        else:
            tensors[name] = weight.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if scheme.layout != "dense":
        config["quantization_config"] = scheme.config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
