"""Scales that are moved between linear layers and what makes their input, so that rounding loses less.

What the model computes stays the same but for rounding: the columns of all layers that read a norm or up_proj are
multiplied, and its rows divided; which those are is in `checkpoint.architectures`. SmoothQuant (Xiao et al., 2023,
arXiv 2211.10438) makes rounded inputs smaller; AWQ makes the weights that matter larger (awq.py). Factors are kept by
the producer's name.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from optimize.checkpoint.architectures import Feed
from optimize.checkpoint.checkpoint import ADAPTER, adapter_tensors, write_adapter
from optimize.checkpoint.formats import W4, Level
from optimize.checkpoint.model import answered, entered, forward, held, through
from optimize.errors import OptimizeError
from optimize.job import Progress
from optimize.steps.calibrated import CalibratedModel, Unit, largest
from optimize.steps.planning import MOVED
from optimize.steps.quantize import awq

SMOOTHING = 0.8  # SmoothQuant's alpha
TOLERANCE = 0.02  # of the logits' size: rounding scaled weights to 16 bits gives a tenth of it


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """Factors (in,) by producer, and whether they smooth inputs (SmoothQuant) or protect weights (AWQ)."""

    factors: Mapping[str, torch.Tensor]
    smoothing: bool
    readers: Mapping[str, tuple[str, ...]]

    def active(self, chosen: Mapping[Unit, Level]) -> dict[str, torch.Tensor]:
        """The factors that a choice of levels has a use for: smoothing where an input is rounded (elsewhere it would
        only make the weights harder to round), AWQ's where weights have 4 bits."""
        levels = {name: level for unit, level in chosen.items() for name in unit.names}
        used = {name for name, level in levels.items() if (level.activations if self.smoothing else level.bits == 4)}
        return {name: factor for name, factor in self.factors.items() if used.intersection(self.readers[name])}


NONE = ChannelScales({}, smoothing=False, readers={})


def smoothing(model: CalibratedModel, progress: Progress) -> ChannelScales:
    """What a norm or up_proj makes is scaled there, by powers of two."""
    factors: dict[str, torch.Tensor] = {}
    readers: dict[str, tuple[str, ...]] = {}
    begun = model.entered()
    count = len(model.layers)
    for at, layer in enumerate(model.layers):
        progress(at, count, "smoothing")
        feeds = {feed.producer: feed for feed in _with_units(model, at)}
        first = {name: feed.consumers[0] for name, feed in feeds.items()}
        with held(layer), torch.inference_mode():
            with model.observed(first, lambda seen, x: largest(seen, x.abs().flatten(0, -2).amax(0))) as widest:
                begun = through([layer], begun)
            for name, feed in feeds.items():
                weights = (model.linear(other).weight.float() for other in _rounded(model, feed))
                heavy = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
                factor = widest[name].clamp(min=1e-5) ** SMOOTHING / heavy.clamp(min=1e-5) ** (1 - SMOOTHING)
                # Powers of two: scaling by them loses no bit of bf16.
                factors[name] = _holdable(model, feed, 2.0 ** factor.clamp(min=1e-5).log2().round())
                readers[name] = feed.consumers
    return ChannelScales(factors, True, readers)


def protecting(model: CalibratedModel, group: int, progress: Progress) -> ChannelScales:
    """AWQ's factors for 4-bit weights in groups, for the same producers as smoothing's."""
    factors: dict[str, torch.Tensor] = {}
    readers: dict[str, tuple[str, ...]] = {}
    begun = model.entered()
    count = len(model.layers)
    for at, layer in enumerate(model.layers):
        progress(at, count, f"AWQ scales, layer {at + 1} of {count}")
        feeds = _with_units(model, at)
        with held(layer):
            hessians = model.hessians(at, {feed: feed.consumers[0] for feed in feeds}, begun)
            for feed, hessian in hessians.items():
                weight = torch.cat([model.linear(name).weight.float() for name in _rounded(model, feed)])
                factors[feed.producer] = _holdable(model, feed, awq.factors(weight, hessian, W4.bits, group))
                readers[feed.producer] = feed.consumers
            with torch.inference_mode():
                begun = through([layer], begun)
    return ChannelScales(factors, False, readers)


def _with_units(model: CalibratedModel, layer: int) -> list[Feed]:
    """What feeds at least one matrix of a layer that is rounded."""
    return [feed for feed in model.feeds_of(layer) if _rounded(model, feed)]


def _rounded(model: CalibratedModel, feed: Feed) -> list[str]:
    layer = int(feed.producer.removeprefix(model.prefix + ".").partition(".")[0])
    names = {name for unit in model.units_of(layer) for name in unit.names}
    return [name for name in feed.consumers if name in names]


def _holdable(model: CalibratedModel, feed: Feed, factor: torch.Tensor) -> torch.Tensor:
    """The factor that a norm's weights can hold: what they are divided by once they are rounded to 16 bits. A norm of
    1 + weight holds few."""
    weight = model.linear(feed.producer).weight
    if weight.dim() == 2:
        return factor
    one = 1.0 if model.family.offset else 0.0
    before = weight.float() + one
    after = (before / factor - one).to(model.dtype).float() + one
    return torch.where((before == 0) | (after == 0), torch.ones_like(factor), before / after)


@torch.inference_mode()
def apply(model: CalibratedModel, layer: int, factors: Mapping[str, torch.Tensor]) -> None:
    """Scale one layer's producers down and all that reads them up."""
    for feed in model.feeds_of(layer):
        factor = factors.get(feed.producer)
        if factor is None:
            continue
        for part, value in model.linear(feed.producer).named_parameters():
            one = 1.0 if model.family.offset and value.dim() == 1 and part == "weight" else 0.0
            rows = _rows(feed, factor).view(-1, *[1] * (value.dim() - 1))
            model.set_weight(feed.producer, (value.float() + one) / rows - one, part)
        for name in feed.consumers:
            model.set_weight(name, model.linear(name).weight.float() * factor)


def _rows(feed: Feed, factor: torch.Tensor) -> torch.Tensor:
    """What the producer's rows are divided by."""
    return torch.cat([torch.ones_like(factor), factor]) if feed.half else factor


@torch.inference_mode()
def moved(model: CalibratedModel, factors: Mapping[str, torch.Tensor]) -> float:
    """How far scaling alone moves the logits, relative to their size; the layers run in float32, one at a time.

    A layer is scaled meanwhile; OptimizeError where that is more than rounding.
    """
    full = model.parameters()
    begun = entered(model.model, model.ids[-1:, :MOVED], 1)
    before = after = begun.states[0].float()
    for at, layer in enumerate(model.layers):
        call = begun.calls[0][id(layer)]
        with held(layer):
            before = forward(_in_float32(layer), before, call)
            apply(model, at, factors)
            after = forward(_in_float32(layer), after, call)
            model.restore(at, full)
    if not bool(before.isfinite().all()):
        raise OptimizeError("the layers give NaN or infinity on the calibration text: the weights are broken")
    right, now = (answered(model.model, states.to(model.dtype)).float() for states in (before, after))
    size = (right - right.mean(-1, keepdim=True)).norm().clamp(min=1e-9)
    off = float((now - right).norm() / size)
    if not off <= TOLERANCE:
        raise OptimizeError(
            f"scaling channels moves the logits of this {model.family.name} model by {off:.1%} before anything is "
            "rounded, which it must not: take `smooth: false` and another method than awq"
        )
    return off


def _in_float32(layer: nn.Module) -> nn.Module:
    """A copy, whose own hooks read nothing."""
    made = copy.deepcopy(layer).float()
    made._forward_pre_hooks.clear()
    made._forward_hooks.clear()
    return made


def fold(adapter: Path, feeds: Mapping[str, Feed], factors: Mapping[str, torch.Tensor], out: Path) -> None:
    """The adapter as it has to be on the scaled base: columns of A times the factor of what the module reads, rows of B
    divided by the factor of what it makes."""
    read = {name: factor for made, factor in factors.items() for name in feeds[made].consumers}
    tensors = adapter_tensors(adapter)
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part.startswith("A") and module in read:
            tensors[name] = (tensor.float() * read[module]).to(tensor.dtype)
        if part.startswith("B") and module in factors:
            rows = _rows(feeds[module], factors[module])
            tensors[name] = (tensor.float().T / rows).T.contiguous().to(tensor.dtype)
    out.mkdir(parents=True)
    write_adapter(out, tensors)
    for file in adapter.iterdir():
        if file.name != ADAPTER and file.is_file():
            shutil.copyfile(file, out / file.name)
