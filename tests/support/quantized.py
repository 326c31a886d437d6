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

    layout: str  # pack-quantized, int-quantized (W8A8), float-quantized, fp8 (blocks), gptq, awq
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
        float8, both = self.layout == "float-quantized", self.layout in ("float-quantized", "int-quantized")
        kind = {"num_bits": 8 if float8 else self.bits, "type": "float" if float8 else "int"}
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        inputs = {**kind, "symmetric": True, "strategy": "token", "dynamic": True} if both else None
        group = {
            "targets": ["Linear"],
            "weights": {**kind, **strategy, "symmetric": not self.points, "dynamic": False},
            "input_activations": inputs,
        }
        return {"quant_method": "compressed-tensors", "format": self.layout, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip

    def rounded(self, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The tensors that stand for one weight (outputs, inputs), by their last names."""
        if self.layout == "float-quantized":
            scale = weight.float().abs().amax(1, keepdim=True) / 448
            return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale.bfloat16()}
        if self.layout == "fp8":
            return _blocks(weight.float(), self.group)
        numbers, scale, zero = self._integers(weight)
        if self.layout == "int-quantized":
            return {"weight": (numbers.flatten(1) - 128).to(torch.int8), "weight_scale": scale}
        return self._packed(numbers.flatten(1), scale, zero)

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """What these tensors stand for, in bfloat16."""
        made = self.rounded(weight) if self.layout in ("float-quantized", "fp8") else {}
        if self.layout == "float-quantized":
            return (made["weight"].float() * made["weight_scale"].float()).bfloat16()
        if self.layout == "fp8":
            return (made["weight"].float() * _spread(made["weight_scale_inv"], weight, self.group)).bfloat16()
        numbers, scale, zero = self._integers(weight)
        return ((numbers - zero[..., None]) * scale.float()[..., None]).flatten(1).bfloat16()

    def _integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numbers (outputs, groups, inputs of a group), and each group's scale and zero."""
        parts = weight.float().unflatten(1, (-1, self.group or weight.shape[1]))
        middle, most = 1 << (self.bits - 1), (1 << self.bits) - 1
        if self.points:
            low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
            scale = ((high - low) / most).bfloat16()
            zero = (-low / scale.float()).round().clamp(0, most).long()
        else:
            scale = (parts.abs().amax(2) / (middle - 1)).bfloat16()
            zero = torch.full(scale.shape, middle)
        return (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, most).long(), scale, zero

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
    numbers = (weight / _spread(scales / 448, weight, size)).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales / 448}


def _spread(scales: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    """Each block's scale at each of its places."""
    rows = scales.repeat_interleave(size, 0)[: weight.shape[0]]
    return rows.repeat_interleave(size, 1)[:, : weight.shape[1]]


def packed(numbers: torch.Tensor, bits: int, dimension: int) -> torch.Tensor:
    """The lowest first in int32, along the dimension."""
    split = numbers.long().unflatten(dimension, (-1, 32 // bits)).movedim(dimension + 1, -1)
    whole = (split << torch.arange(0, 32, bits)).sum(-1)
    return (whole - (whole >= 2**31) * 2**32).to(torch.int32).contiguous()


def _awq(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.unflatten(1, (-1, 8))[..., torch.tensor(AWQ_ORDER)].flatten(1)


def save(model: Any, scheme: Scheme, folder: Path, dense: bool = False) -> Path:
    """A model of transformers', its linear layers rounded; `dense`: in bfloat16 all the same."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.contiguous()
        elif dense:
            tensors[name] = scheme.dense(weight)
        else:
            made = scheme.rounded(weight)
            tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if not dense:
        config["quantization_config"] = scheme.config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
