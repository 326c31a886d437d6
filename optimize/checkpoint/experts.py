"""Mixtures of experts as transformers computes them: the weights of all experts of a layer in one tensor.

On disk each expert has matrices of its own, Mixtral's under names of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

ONE = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fused(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with `experts.gate_up_proj` (experts, 2 x width, hidden) and `experts.down_proj` (experts, hidden,
    width) for each layer that has experts."""
    made: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, weight in weights.items():
        own_name = name.replace(".block_sparse_moe.", ".mlp.")
        if match := ONE.fullmatch(own_name):
            layer, expert, part = match.groups()
            layers.setdefault(layer, {}).setdefault(PARTS.get(part, part), {})[int(expert)] = weight
        else:
            made[own_name] = weight
    for layer, parts in layers.items():
        gate, up, down = (
            [parts[part][at] for at in sorted(parts[part])] for part in ("gate_proj", "up_proj", "down_proj")
        )
        made[f"{layer}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        made[f"{layer}.down_proj"] = torch.stack(down)
    return made
