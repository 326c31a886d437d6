"""Scales that are moved between a unit's weights and what makes its input, so that rounding loses less.

What the model computes stays the same but for rounding: the columns of the unit's weights are multiplied, and the rows
of its producer divided. SmoothQuant (Xiao et al., 2023, arXiv 2211.10438) makes rounded inputs smaller; AWQ makes the
weights that matter larger (awq.py). Factors are kept by the name of their unit's first layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from optimize.checkpoint.checkpoint import ADAPTER
from optimize.checkpoint.formats import W4, Level
from optimize.checkpoint.model import through
from optimize.job import Progress
from optimize.steps.calibrated import BATCH, UNITS, CalibratedModel, Unit
from optimize.steps.quantize import awq

SMOOTHING = 0.8  # SmoothQuant's alpha


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """Factors (in,) of units, and whether they smooth inputs (SmoothQuant) or protect weights (AWQ)."""

    factors: Mapping[str, torch.Tensor]
    smoothing: bool

    def active(self, chosen: Mapping[Unit, Level]) -> dict[str, torch.Tensor]:
        """The factors that a choice of levels has a use for: smoothing where an input is rounded (elsewhere it would
        only make the weights harder to round), AWQ's where weights have 4 bits."""
        return {
            unit.names[0]: self.factors[unit.names[0]]
            for unit, level in chosen.items()
            if unit.names[0] in self.factors and (level.activations if self.smoothing else level.bits == 4)
        }


def smoothing(model: CalibratedModel, progress: Progress) -> ChannelScales:
    """The input of q, k, v and of gate, up is scaled in the norm before them, the input of down in up's rows."""
    units = [unit for unit in model.units if _has_producer(unit)]
    batches = model.ids.split(BATCH)
    with model.observed(units, lambda x: x.abs().flatten(0, -2).amax(0), torch.maximum) as widest:
        for done, batch in enumerate(batches):
            with torch.inference_mode():
                model.model(input_ids=batch, use_cache=False)
            progress(done, len(batches), "smoothing")
    factors = {}
    for unit in units:
        heavy = torch.stack([model.linear(name).weight.float().abs().amax(0) for name in unit.names]).amax(0)
        factor = widest[unit].clamp(min=1e-5) ** SMOOTHING / heavy.clamp(min=1e-5) ** (1 - SMOOTHING)
        # Powers of two: scaling by them loses no bit of bf16.
        factors[unit.names[0]] = 2.0 ** factor.clamp(min=1e-5).log2().round()
    return ChannelScales(factors, smoothing=True)


def protecting(model: CalibratedModel, group: int, progress: Progress) -> ChannelScales:
    """AWQ's factors for 4-bit weights in groups, for the same producers as smoothing's."""
    factors: dict[str, torch.Tensor] = {}
    begun = model.entered()
    count = len(model.layers)
    for at, layer in enumerate(model.layers):
        progress(at, count, f"AWQ scales, layer {at + 1} of {count}")
        units = [unit for unit in model.units_of(at) if _has_producer(unit)]
        for unit, hessian in model.hessians(at, units, begun).items():
            weight = torch.cat([model.linear(name).weight.float() for name in unit.names])
            factors[unit.names[0]] = awq.factors(weight, hessian, W4.bits, group)
        with torch.inference_mode():
            begun = through([layer], begun)
    return ChannelScales(factors, smoothing=False)


def _has_producer(unit: Unit) -> bool:
    return not unit.names[0].endswith("o_proj")


def producer(name: str) -> str:
    """The module whose output the layer reads, up to a product with something else."""
    layer, _, _ = name.rpartition(".")
    if name.endswith("down_proj"):
        return f"{layer}.up_proj"
    block = layer.rpartition(".")[0]
    return f"{block}.{'input_layernorm' if '.self_attn.' in name else 'post_attention_layernorm'}"


@torch.inference_mode()
def apply(model: CalibratedModel, layer: int, factors: Mapping[str, torch.Tensor]) -> None:
    """Scale one layer's producers down and its units up."""
    for unit in model.units_of(layer):
        factor = factors.get(unit.names[0])
        if factor is None:
            continue
        source = producer(unit.names[0])
        weight = model.linear(source).weight
        rows = factor.view(-1, *[1] * (weight.dim() - 1))
        model.set_weight(source, weight.float() / rows)
        for name in unit.names:
            model.set_weight(name, model.linear(name).weight.float() * factor)


def fold(adapter: Path, factors: Mapping[str, torch.Tensor], out: Path) -> None:
    """The adapter as it has to be on the scaled base: columns of A times the factor, rows of up's B divided by it."""
    from safetensors.torch import load_file, save_file

    by_module: dict[str, torch.Tensor] = {}
    for name, factor in factors.items():
        layer = name.rpartition(".")[0]
        family = next(family for family in UNITS if name.rpartition(".")[2] in family)
        by_module |= {f"{layer}.{leaf}": factor for leaf in family}
    tensors = load_file(adapter / ADAPTER)
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part.startswith("A") and module in by_module:
            tensors[name] = (tensor.float() * by_module[module]).to(tensor.dtype)
        down = module.removesuffix("up_proj") + "down_proj"
        if part.startswith("B") and module.endswith(".up_proj") and down in factors:
            tensors[name] = (tensor.float().T / factors[down]).T.contiguous().to(tensor.dtype)
    out.mkdir(parents=True)
    save_file(tensors, out / ADAPTER, {"format": "pt"})
    for file in adapter.iterdir():
        if file.name != ADAPTER and file.is_file():
            shutil.copyfile(file, out / file.name)
