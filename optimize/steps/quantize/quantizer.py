"""Calibrated quantization, layer by layer, into compressed-tensors' checkpoint format, which vLLM loads as it is.

The weights are mapped, so memory holds one layer, the hidden states of the calibration text, and one Hessian. Layers
are quantized in the engine's fused units (q, k and v are one matrix there, gate and up another), and each layer is
calibrated on what the quantized layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from optimize.checkpoint import formats, kv_cache
from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.formats import FULL, LEVELS, W4, W8A8, Level, Rounded
from optimize.checkpoint.linears import group as group_of
from optimize.checkpoint.linears import ignored
from optimize.checkpoint.model import (
    Entered,
    compute_dtype,
    entered,
    layers,
    opened,
    prefix,
    rounding,
    settle,
    through,
    tokenizer,
)
from optimize.data import text
from optimize.errors import OptimizeError, Refused
from optimize.job import Job, Progress
from optimize.steps.quantize import awq, gptq
from optimize.steps.quantize.mixed import mixed

BATCH = 4
SMOOTHING = 0.8  # SmoothQuant's alpha


# Linear layers that the engine fuses, so that they share a level; in the order in which a layer uses them.
UNITS = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Linear layers with one input and one level, by their full names."""

    layer: int
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.layer}.{'/'.join(name.rpartition('.')[2].removesuffix('_proj') for name in self.names)}"


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    options = job.options
    model_dir = Path(job.model)
    checkpoint = Checkpoint(model_dir)
    level = LEVELS[options["scheme"]]
    group = group_of(checkpoint, options["group"]) if level is W4 else 0
    mixes = bool(options["budget"] or options["agreement"])
    rounds = level is W8A8 or (mixes and job.target == "cpu")  # whether a layer's input may be rounded
    smooth = options["smooth"] is True or (options["smooth"] == "auto" and not job.adapters and rounds)
    ids = _windows(job, model_dir)
    progress(0, 1, "loading")
    quantizer = Quantizer(model_dir, ids, group, options["method"], frozenset(options["ignore"]), progress)
    quantizer.form, quantizer.smooths = options["format"], smooth
    if options["kv_cache"] == "fp8":
        progress(0, 1, "keys and values")
        quantizer.cache = kv_cache.measured(quantizer.model, list(quantizer.ids.split(BATCH)))
    notes: dict[str, Any] = {
        "scheme": level.name,
        "group": group or None,
        "smooth": smooth,
        "calibration": quantizer.about,
    }
    adapters: dict[str, Path] = {name: Path(path) for name, path in job.adapters.items()}
    factors = quantizer.smoothing() if smooth else quantizer.protecting() if options["method"] == "awq" else {}
    chosen = {unit: level for unit in quantizer.units}
    if mixes:
        partial = job.folder / "partial"
        partial.mkdir(exist_ok=True)
        chosen, told = mixed(quantizer, level, job.target, options["budget"], options["agreement"], factors, partial)
        notes |= told
    factors = quantizer.active(chosen, factors)
    out = job.folder / "model"
    quantizer.write(chosen, factors, out)
    kept: dict[str, int] = {}
    for unit, its in chosen.items():
        kept[its.name] = kept.get(its.name, 0) + len(unit.names)
    notes["layers"] = kept
    notes["kept"] = {unit.label: its.name for unit, its in chosen.items() if its is not level}
    notes["adapters"] = {name: "applies unchanged" for name in adapters}
    if factors:
        for name, folder in adapters.items():
            _fold(folder, factors, job.folder / "adapters" / name)
            notes["adapters"][name] = f"rewritten: {'smoothing' if smooth else 'AWQ scales'} folded in"
    return notes


class Quantizer:
    """One model, its calibration text, and what the steps of quantization need of them."""

    def __init__(
        self, folder: Path, ids: list[list[int]], group: int, method: str, ignore: frozenset[str], progress: Progress
    ) -> None:
        self.folder = folder
        self.group = group
        self.method = method
        self.progress = progress
        self.form = "compressed-tensors"
        self.smooths = True
        self.cache: dict[str, torch.Tensor] = {}
        self.dtype = compute_dtype()
        self.model = opened(folder, self.dtype)
        self.layers = layers(self.model)
        self.prefix = prefix(self.model)
        self.ids = torch.tensor(ids)
        self.about = {"samples": len(ids), "tokens": len(ids[0])}
        self.units = list(self._units(ignore))
        if not self.units:
            raise Refused(
                "the model has no q/k/v/o or gate/up/down projections; only Llama-like decoders are quantized"
            )

    def _units(self, ignore: frozenset[str]) -> Iterator[Unit]:
        for at, layer in enumerate(self.layers):
            linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            for family in UNITS:
                names = tuple(f"{self.prefix}.{at}.{name}" for name in linears if name.rpartition(".")[2] in family)
                names = tuple(name for name in names if not ignored(name, ignore))
                if names:
                    yield Unit(at, names)

    def smoothing(self) -> dict[str, torch.Tensor]:
        """unit input's producer -> factors (in,): what leaves an activation and goes into its weights.

        SmoothQuant (Xiao et al., 2023, arXiv 2211.10438). The input of q, k, v and of gate, up is scaled in the norm
        before them, the input of down in up's rows, so that the model computes what it did.
        """
        widest: dict[str, torch.Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                seen = inputs[0].float().abs().flatten(0, -2).amax(0)
                widest[name] = torch.maximum(widest[name], seen) if name in widest else seen

            return hook

        first = {unit.names[0]: unit for unit in self.units if not unit.names[0].endswith("o_proj")}
        handles = [self.linear(name).register_forward_pre_hook(watch(name)) for name in first]
        batches = self.ids.split(BATCH)
        for done, batch in enumerate(batches):
            with torch.inference_mode():
                self.model(input_ids=batch, use_cache=False)
            self.progress(done, len(batches), "smoothing")
        for handle in handles:
            handle.remove()
        factors = {}
        for name, unit in first.items():
            heavy = torch.stack([self.linear(part).weight.float().abs().amax(0) for part in unit.names]).amax(0)
            factor = widest[name].clamp(min=1e-5) ** SMOOTHING / heavy.clamp(min=1e-5) ** (1 - SMOOTHING)
            # Powers of two: scaling by them loses no bit of bf16.
            factors[name] = 2.0 ** factor.clamp(min=1e-5).log2().round()
        return factors

    def protecting(self) -> dict[str, torch.Tensor]:
        """AWQ's factors, under the same names as smoothing's, for the same producers."""
        found: dict[str, torch.Tensor] = {}
        begun = entered(self.model, self.ids, BATCH)
        for at, layer in enumerate(self.layers):
            self.progress(at, len(self.layers), f"AWQ scales, layer {at + 1} of {len(self.layers)}")
            units = [unit for unit in self.units if unit.layer == at and not unit.names[0].endswith("o_proj")]
            for unit, hessian in self._hessians(layer, units, begun).items():
                weight = torch.cat([self.linear(name).weight.float() for name in unit.names])
                found[unit.names[0]] = awq.factors(weight, hessian, W4.bits, self.group)
            with torch.inference_mode():
                begun = through([layer], begun)
        return found

    @torch.inference_mode()
    def rounded(
        self, chosen: Mapping[Unit, Level], factors: Mapping[str, torch.Tensor], say: str, windows: int = 0
    ) -> Iterator[tuple[Unit, dict[str, Rounded]]]:
        """Each unit's integers and scales, layer after layer; the model holds the rounded weights afterwards."""
        begun = entered(self.model, self.ids[-windows:], BATCH)
        for at, layer in enumerate(self.layers):
            self.progress(at, len(self.layers), f"{say}, layer {at + 1} of {len(self.layers)}")
            units = [unit for unit in chosen if unit.layer == at and chosen[unit] is not FULL]
            self.smooth(at, factors)
            scaled = [unit for unit in units if chosen[unit].preset == "NVFP4"]
            widest = self._widest(layer, scaled, begun) if scaled else {}
            hooks = [
                self.linear(name).register_forward_pre_hook(_rounding(chosen[unit], widest.get(unit)))
                for unit in units
                if chosen[unit].activations
                for name in unit.names
            ]
            hessians = self._hessians(layer, units, begun) if self.method != "rtn" else {}
            for unit in units:
                made = self.round(unit, chosen[unit], hessians.get(unit), widest.get(unit))
                for name, its in made.items():
                    self.linear(name).weight = nn.Parameter(its.dense.to(self.dtype), requires_grad=False)
                yield unit, made
            begun = through([layer], begun)
            if not all(bool(state.isfinite().all()) for state in begun.states):
                raise OptimizeError(f"layer {at} gives NaN or infinity on the calibration text: the weights are broken")
            for hook in hooks:
                hook.remove()

    def _hessians(self, layer: nn.Module, units: Sequence[Unit], begun: Entered) -> dict[Unit, torch.Tensor]:
        found: dict[Unit, torch.Tensor] = {}

        def gather(unit: Unit) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2).float()
                made = x.T @ x
                found[unit] = found[unit].add_(made) if unit in found else made

            return hook

        hooks = [self.linear(unit.names[0]).register_forward_pre_hook(gather(unit)) for unit in units]
        through([layer], begun)
        for hook in hooks:
            hook.remove()
        return found

    def _widest(self, layer: nn.Module, units: Sequence[Unit], begun: Entered) -> dict[Unit, torch.Tensor]:
        """The largest magnitude in each unit's input."""
        found: dict[Unit, torch.Tensor] = {}

        def watch(unit: Unit) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                seen = inputs[0].float().abs().amax()
                found[unit] = torch.maximum(found[unit], seen) if unit in found else seen

            return hook

        hooks = [self.linear(unit.names[0]).register_forward_pre_hook(watch(unit)) for unit in units]
        through([layer], begun)
        for hook in hooks:
            hook.remove()
        return found

    @torch.inference_mode()
    def round(
        self, unit: Unit, level: Level, hessian: torch.Tensor | None, widest: torch.Tensor | None = None
    ) -> dict[str, Rounded]:
        weights = [self.linear(name).weight.float() for name in unit.names]
        stacked = torch.cat(weights)
        if not bool(stacked.isfinite().all()):
            raise OptimizeError(f"{unit.names[0]} holds NaN or infinity: the weights are broken")
        rows = [weight.shape[0] for weight in weights]
        if level.preset:
            return dict(zip(unit.names, formats.preset(weights, level, widest), strict=True))
        if level.float8:
            scale = (stacked.abs().amax(1, keepdim=True).clamp(min=1e-8) / 448.0).bfloat16().float()
            integers = (stacked / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            group = self.group if level.bits == 4 else stacked.shape[1]
            importance = None if hessian is None else hessian.diagonal()
            scale = gptq.scales(stacked, level.bits, group, importance)
            if hessian is None or self.method == "awq":
                integers = gptq.nearest(stacked, scale, level.bits)
            else:
                integers = gptq.gptq(stacked, hessian, scale, level.bits)
        parts = zip(unit.names, integers.split(rows), scale.split(rows), strict=True)
        return {name: formats.whole(part.contiguous(), of.contiguous(), level, self.form) for name, part, of in parts}

    @torch.inference_mode()
    def smooth(self, at: int, factors: Mapping[str, torch.Tensor]) -> None:
        """Scale one layer's producers down and consumers up."""
        for unit in self.units:
            factor = factors.get(unit.names[0])
            if unit.layer != at or factor is None:
                continue
            producer = self.linear(self.producer(unit.names[0]))
            rows = factor.view(-1, *[1] * (producer.weight.dim() - 1))
            producer.weight = nn.Parameter((producer.weight.float() / rows).to(self.dtype), requires_grad=False)
            for name in unit.names:
                linear = self.linear(name)
                linear.weight = nn.Parameter((linear.weight.float() * factor).to(self.dtype), requires_grad=False)

    def write(self, chosen: Mapping[Unit, Level], factors: Mapping[str, torch.Tensor], out: Path) -> None:
        """The quantized checkpoint."""
        self.reopen()
        checkpoint = Checkpoint(self.folder)
        writer = Writer(out, self.folder)
        changed = {f"{name}.weight" for unit, level in chosen.items() if level is not FULL for name in unit.names}
        moved = {f"{name}.weight" for unit in self.units if unit.names[0] in factors for name in unit.names}
        moved |= {f"{self.producer(name)}.weight" for name in factors}
        for name in checkpoint.entries:
            if name not in changed and name not in moved:
                writer.add(name, checkpoint.tensor(name))
        for _, made in self.rounded(chosen, factors, "quantizing"):
            for name, its in made.items():
                for part, tensor in its.tensors.items():
                    writer.add(f"{name}.{part}", tensor)
        for name, scale in self.cache.items():
            writer.add(name, scale)
        state = dict(self.model.named_parameters())
        for name in sorted(moved - changed):
            writer.add(name, state[name].detach().to(checkpoint.tensor(name).dtype))
        full = [name for unit, level in chosen.items() if level is FULL for name in unit.names]
        others = {
            name for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not any(name in unit.names for unit in chosen)
        }  # fmt: skip
        if self.form == "gptq":
            config = formats.gptq_config(self.group, full)
        else:
            config = _config(chosen, sorted(others) + full, self.group)
        if self.cache:
            config["kv_cache_scheme"] = kv_cache.SCHEME
        writer.close({**checkpoint.config, "quantization_config": config})

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """(windows, tokens, vocabulary) in float32, of the model as it is now."""
        made = []
        for row in ids.split(1):
            with torch.inference_mode():
                made.append(log_softmax(self.model(input_ids=row, use_cache=False).logits.float(), -1))
        return torch.cat(made)

    def active(self, chosen: Mapping[Unit, Level], factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The factors that a choice of levels has a use for: smoothing where an input is rounded (elsewhere it would
        only make the weights harder to round), AWQ's where weights have 4 bits."""
        return {
            unit.names[0]: factors[unit.names[0]]
            for unit, level in chosen.items()
            if unit.names[0] in factors and (level.activations if self.smooths else level.bits == 4)
        }

    def reopen(self) -> None:
        """The full model again."""
        self.model = opened(self.folder, self.dtype)
        self.layers = layers(self.model)

    @staticmethod
    def producer(name: str) -> str:
        """The module whose output the unit reads, up to a product with something else."""
        layer, _, _ = name.rpartition(".")
        if name.endswith("down_proj"):
            return f"{layer}.up_proj"
        block = layer.rpartition(".")[0]
        return f"{block}.{'input_layernorm' if '.self_attn.' in name else 'post_attention_layernorm'}"

    def linear(self, name: str) -> Any:
        return self.model.get_submodule(name)


def _config(chosen: Mapping[Unit, Level], ignore: list[str], group: int) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`."""
    levels = sorted({level for level in chosen.values() if level is not FULL}, key=lambda level: level.name)
    groups = {}
    for number, level in enumerate(levels):
        names = [name for unit, its in chosen.items() if its is level for name in unit.names]
        groups[f"group_{number}"] = {
            "targets": names if len(levels) > 1 else ["Linear"],
            **formats.group_config(level, group),
        }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.form_of(levels[0]) if len(levels) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _fold(folder: Path, factors: Mapping[str, torch.Tensor], out: Path) -> None:
    """The adapter as it has to be on the smoothed base: columns of A times the factor, rows of up's B divided by it."""
    import shutil

    from safetensors.torch import load_file, save_file

    of: dict[str, torch.Tensor] = {}
    for name, factor in factors.items():
        layer = name.rpartition(".")[0]
        family = next(family for family in UNITS if name.rpartition(".")[2] in family)
        of |= {f"{layer}.{leaf}": factor for leaf in family}
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part.startswith("A") and module in of:
            tensors[name] = (tensor.float() * of[module]).to(tensor.dtype)
        down = module.removesuffix("up_proj") + "down_proj"
        if part.startswith("B") and module.endswith(".up_proj") and down in factors:
            tensors[name] = (tensor.float().T / factors[down]).T.contiguous().to(tensor.dtype)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    for file in folder.iterdir():
        if file.name != "adapter_model.safetensors" and file.is_file():
            shutil.copyfile(file, out / file.name)


def _windows(job: Job, folder: Path) -> list[list[int]]:
    part = job.calibration
    return text.windows(tokenizer(folder), text.documents(part, False), part.samples, part.tokens, job.seed)


def _rounding(level: Level, widest: torch.Tensor | None = None) -> Any:
    """A hook that rounds a unit's input as the engine does."""
    if widest is None:
        return rounding(formats.group_config(level, 0))
    from compressed_tensors.quantization.utils import generate_gparam

    return rounding(formats.group_config(level, 0), generate_gparam(-widest, widest))
