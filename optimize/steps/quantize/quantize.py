"""The quantize step: scales of channels and of the KV cache, a level for each unit, and the quantized checkpoint."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint import artifact, kv_cache
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.formats import LEVELS, W4, W8A8, Level
from optimize.checkpoint.linears import group as group_of
from optimize.checkpoint.model import settle
from optimize.job import Job, Progress
from optimize.steps.calibrated import CalibratedModel, Unit, windows
from optimize.steps.planning import BATCH
from optimize.steps.quantize import channel_scales
from optimize.steps.quantize.channel_scales import ChannelScales
from optimize.steps.quantize.kept import Kept
from optimize.steps.quantize.method import methods
from optimize.steps.quantize.mixed import mixed, within
from optimize.steps.quantize.quantizer import Quantizer


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    options = job.options
    level = LEVELS[options["scheme"]]
    group = group_of(Checkpoint(Path(job.model)), options["group"]) if level is W4 else 0
    ids = windows(job)
    progress(0, 1, "loading")
    # A mix of levels looks at any layer at any time.
    model = CalibratedModel(Path(job.model), ids, frozenset(options["ignore"]), by_layer=not _mixes(options))
    cache: dict[str, torch.Tensor] = {}
    if options["kv_cache"] == "fp8":
        progress(0, 1, "keys and values")
        cache = kv_cache.measured(model.model, list(model.ids.split(BATCH)))
    scales = _scales(job, model, level, group, progress)
    notes: dict[str, Any] = {
        "scheme": level.name,
        "group": group or None,
        "smooth": scales.smoothing,
        "calibration": {"samples": len(ids), "tokens": len(ids[0])},
    }
    quantizer = Quantizer(model, group, options["method"], options["format"], progress)
    chosen = dict.fromkeys(model.units, level)
    partial = job.folder / "partial"
    partial.mkdir(exist_ok=True)
    if _mixes(options):
        if options["bits"]:
            chosen, search = within(quantizer, level, job.target, options["bits"], scales, partial)
        else:
            bounds = options["budget"], options["agreement"]
            chosen, search = mixed(quantizer, level, job.target, *bounds, scales, partial)
        notes |= search
    factors = scales.active(chosen)
    if factors:
        model.reopen()
        notes["scaling_moves_logits"] = round(channel_scales.moved(model, factors), 6)
    quantizer.write(chosen, factors, cache, partial / "model", Kept(partial / "layers.safetensors"))
    shutil.copytree(partial / "model", job.folder / "model", copy_function=artifact.taken)
    notes |= _levels(chosen, level)
    notes["adapters"] = {name: "applies unchanged" for name in job.adapters}
    if factors:
        feeds = {feed.producer: feed for at in range(len(model.layers)) for feed in model.feeds_of(at)}
        for name, folder in job.adapters.items():
            channel_scales.fold(Path(folder), feeds, factors, job.folder / "adapters" / name)
            notes["adapters"][name] = f"rewritten: {'smoothing' if scales.smoothing else 'AWQ scales'} folded in"
    return notes


def _mixes(options: dict[str, Any]) -> bool:
    return bool(options["budget"] or options["agreement"] or options["bits"])


def _scales(job: Job, model: CalibratedModel, level: Level, group: int, progress: Progress) -> ChannelScales:
    """`smooth: auto` smooths where a layer's input may be rounded and no adapter was trained on the channels."""
    wish = job.options["smooth"]
    rounds_inputs = level is W8A8 or (_mixes(job.options) and job.target == "cpu")
    if wish is True or (wish == "auto" and not job.adapters and rounds_inputs):
        return channel_scales.smoothing(model, progress)
    scales = methods()[job.options["method"]].scales
    return scales(model, group, progress) if scales else channel_scales.NONE


def _levels(chosen: dict[Unit, Level], level: Level) -> dict[str, Any]:
    """How many layers have each level, and the units that kept more bits."""
    layers: Counter[str] = Counter()
    for unit, of_unit in chosen.items():
        layers[of_unit.name] += len(unit.names)
    kept = {unit.label: of_unit.name for unit, of_unit in chosen.items() if of_unit is not level}
    return {"layers": dict(layers), "kept": kept}
