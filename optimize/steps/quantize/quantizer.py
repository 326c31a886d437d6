"""Calibrated rounding, layer by layer, into compressed-tensors' checkpoint format, which vLLM loads as it is.

Layers are rounded in the engine's fused units, and each layer is calibrated on what the rounded layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimize.checkpoint import formats, kv_cache
from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.formats import FULL, Level, Rounded
from optimize.checkpoint.model import Entered, held, rounding, through
from optimize.errors import OptimizeError
from optimize.job import Progress
from optimize.steps.calibrated import CalibratedModel, Unit, first_readers, largest
from optimize.steps.quantize import channel_scales, gptq
from optimize.steps.quantize.kept import Found, Kept
from optimize.steps.quantize.method import Method, methods
from optimize.steps.quantize.rules import TRIED


class Quantizer:
    """A model rounded with one group size, method and format, at whatever levels are chosen."""

    def __init__(self, model: CalibratedModel, group: int, method: str, form: str, progress: Progress) -> None:
        self.model = model
        self.group = group
        self.method = methods()[method]
        self.form = form
        self.progress = progress

    def write(
        self,
        chosen: Mapping[Unit, Level],
        factors: Mapping[str, torch.Tensor],
        cache: Mapping[str, torch.Tensor],
        out: Path,
        kept: Kept,
    ) -> None:
        """The quantized checkpoint; `cache` are the scales of an fp8 KV cache. What is `kept` is not done again."""
        self.model.reopen()
        checkpoint = Checkpoint(self.model.folder)
        rounded = {f"{name}.weight" for unit, level in chosen.items() if level is not FULL for name in unit.names}
        scaled = {name for name in self.model.scaled(factors) if name in checkpoint.entries}
        begun = self.model.entered()
        choice = [[unit.label, level.name] for unit, level in chosen.items()]
        found = kept.read(choice, out) or Found(0, [], begun.states, begun.states if self.method.follows else [])
        begun, whole = Entered(found.states, begun.calls), Entered(found.whole, begun.calls)
        writer = Writer(out, self.model.folder, mark=found.mark)
        if not found.layers:
            for name in (name for name in checkpoint.entries if name not in rounded | scaled):
                writer.add(name, checkpoint.tensor(name))
            for name, scale in cache.items():
                writer.add(name, scale)
        full = self.model.parameters()

        def finished(layer: int, after: Entered, of_whole: Entered) -> None:
            """What is scaled and not rounded is written; then the layer is as it is on disk, and takes no memory."""
            inside = f"{self.model.prefix}.{layer}."
            for name in sorted(name for name in scaled - rounded if name.startswith(inside)):
                writer.add(name, self.model.model.get_parameter(name).detach().to(checkpoint.tensor(name).dtype))
            self.model.restore(layer, full)
            last = layer + 1 == len(self.model.layers)
            kept.write(choice, layer + 1, after.states, of_whole.states, writer, last)

        rounded_units = self._round_all(
            chosen, factors, "quantizing", self.method, begun, whole, found.layers, finished
        )
        for _, layers in rounded_units:
            for name, layer in layers.items():
                for part, tensor in layer.tensors.items():
                    writer.add(f"{name}.{part}", tensor)
        config = self._config(chosen)
        if cache:
            config["kv_cache_scheme"] = kv_cache.SCHEME
        writer.close({**checkpoint.config, "quantization_config": config})

    def answers(
        self, chosen: Mapping[Unit, Level], factors: Mapping[str, torch.Tensor], ids: torch.Tensor, say: str
    ) -> torch.Tensor:
        """The log-probabilities of the model quantized so, (rows, tokens, vocabulary); afterwards it is full again.

        Eight bits are rounded to the nearest here, which is a little worse than GPTQ and takes a tenth of the time.
        """
        few = all(level.bits >= 8 for level in chosen.values())
        method, windows = (methods()["rtn"], 1) if few else (self.method, TRIED)
        try:
            begun = self.model.entered(windows)
            for _ in self._round_all(chosen, factors, say, method, begun, begun):
                pass
            for unit, level in chosen.items():
                self._round_inputs(unit, level)
            return self.model.log_probabilities(ids).bfloat16()
        finally:
            self.model.reopen()

    @contextmanager
    def alone(self, unit: Unit, level: Level, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with one unit alone rounded, to the nearest."""
        names = {*(f"{name}.weight" for name in unit.names), *self.model.scaled(factors)}
        full = {name: self.model.model.get_parameter(name) for name in names}
        channel_scales.apply(self.model, unit.layer, factors)
        for name, layer in self._round(unit, level, methods()["rtn"], None).items():
            self.model.set_weight(name, layer.dense)
        hooks = self._round_inputs(unit, level)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, weight in full.items():
                self.model.set_parameter(name, weight)

    @torch.inference_mode()
    def _round_all(
        self,
        chosen: Mapping[Unit, Level],
        factors: Mapping[str, torch.Tensor],
        say: str,
        method: Method,
        begun: Entered,
        whole: Entered,
        first: int = 0,
        finished: Callable[[int, Entered, Entered], None] = lambda *_: None,
    ) -> Iterator[tuple[Unit, dict[str, Rounded]]]:
        """Each unit's integers and scales, layer after layer from the `first`, which is called with `begun`, and in the
        original with `whole`; the model holds the rounded weights afterwards. `finished` hears of each layer, and what
        it gives the next.
        """
        model = self.model
        vectors = sum(state[..., 0].numel() for state in begun.states)
        for at, layer in enumerate(model.layers[first:], first):
            self.progress(at, len(model.layers), f"{say}, layer {at + 1} of {len(model.layers)}")
            with held(layer):
                units = [unit for unit in chosen if unit.layer == at and chosen[unit] is not FULL]
                channel_scales.apply(model, at, factors)
                widest = self._widest(at, [unit for unit in units if chosen[unit].preset == "NVFP4"], begun)
                hooks = [hook for unit in units for hook in self._round_inputs(unit, chosen[unit], widest.get(unit))]
                hessians, apart = dict[Unit, torch.Tensor](), dict[Unit, torch.Tensor]()
                if method.follows:
                    hessians, apart, whole = model.products(at, first_readers(units), begun, whole)
                elif method.calibrates:
                    hessians = model.hessians(at, first_readers(units), begun)
                for unit in units:
                    rounded = self._round(
                        unit, chosen[unit], method, hessians.pop(unit, None), widest.get(unit), vectors,
                        apart.pop(unit, None),
                    )  # fmt: skip
                    for name, result in rounded.items():
                        model.set_weight(name, result.dense)
                    yield unit, rounded
                begun = through([layer], begun)
                if not all(bool(state.isfinite().all()) for state in begun.states):
                    raise OptimizeError(
                        f"layer {at} gives NaN or infinity on the calibration text: the weights are broken"
                    )
                for hook in hooks:
                    hook.remove()
                finished(at, begun, whole)

    def _widest(self, layer: int, units: Sequence[Unit], begun: Entered) -> dict[Unit, torch.Tensor]:
        """The largest magnitude in each unit's input."""
        if not units:
            return {}
        with self.model.observed(first_readers(units), lambda seen, x: largest(seen, x.abs().amax())) as widest:
            through([self.model.layers[layer]], begun)
        return widest

    def _round_inputs(self, unit: Unit, level: Level, widest: torch.Tensor | None = None) -> list[Any]:
        """Hooks that round a unit's input as the engine does."""
        if not level.activations:
            return []
        scale = None
        if widest is not None:
            from compressed_tensors.quantization.utils import generate_gparam

            scale = generate_gparam(-widest, widest)
        hook = rounding(formats.group_config(level, 0), scale)
        return [self.model.linear(name).register_forward_pre_hook(hook) for name in unit.names]

    @torch.inference_mode()
    def _round(
        self,
        unit: Unit,
        level: Level,
        method: Method,
        hessian: torch.Tensor | None,
        widest: torch.Tensor | None = None,
        vectors: int = 0,
        apart: torch.Tensor | None = None,
    ) -> dict[str, Rounded]:
        weights = [self.model.linear(name).weight for name in unit.names]
        stacked = torch.cat(weights).float()
        if not bool(stacked.sum().isfinite()):
            pairs = zip(unit.names, weights, strict=True)
            broken = next((name for name, weight in pairs if not bool(weight.float().sum().isfinite())), unit.names[0])
            raise OptimizeError(f"{broken} holds NaN or infinity: the weights are broken")
        rows = [weight.shape[0] for weight in weights]
        if level.preset:
            return dict(zip(unit.names, formats.preset(list(stacked.split(rows)), level, widest), strict=True))
        if level.float8:
            scale = (stacked.abs().amax(1, keepdim=True).clamp(min=1e-8) / 448.0).bfloat16().float()
            integers = (stacked / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            if level.bits == 4 and hessian is not None and apart is not None:
                stacked = gptq.following(stacked, gptq.damped(hessian.clone(), vectors), apart)
            group = self.group if level.bits == 4 else stacked.shape[1]
            importance = None if hessian is None else hessian.diagonal()
            scale = gptq.scales(stacked, level.bits, group, importance)
            integers = method.round(stacked, scale, level.bits, hessian, vectors)
        parts = zip(unit.names, integers.split(rows), scale.split(rows), strict=True)
        return {name: formats.whole(part.contiguous(), of.contiguous(), level, self.form) for name, part, of in parts}

    def _config(self, chosen: Mapping[Unit, Level]) -> dict[str, Any]:
        """The checkpoint's `quantization_config`."""
        full = [name for unit, level in chosen.items() if level is FULL for name in unit.names]
        if self.form == "gptq":
            return formats.gptq_config(self.group, full)
        others = {
            name for name, module in self.model.model.named_modules()
            if isinstance(module, nn.Linear) and not any(name in unit.names for unit in chosen)
        }  # fmt: skip
        levels = sorted({level for level in chosen.values() if level is not FULL}, key=lambda level: level.name)
        groups = {}
        for number, level in enumerate(levels):
            names = [name for unit, of_unit in chosen.items() if of_unit is level for name in unit.names]
            groups[f"group_{number}"] = {
                "targets": names if len(levels) > 1 else ["Linear"],
                **formats.group_config(level, self.group),
            }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.form_of(levels[0]) if len(levels) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": sorted(others) + full,
            "kv_cache_scheme": None,
        }
