"""A merged model against PEFT's merge of the same adapters, in float32: its weights, and its logits on probe text.

PEFT merges a layer when it is called and the layer is forgotten afterwards, so that memory holds one of them.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimize.checkpoint.checkpoint import Checkpoint, adapter_config
from optimize.checkpoint.model import layers, logits, opened, prefix, tokenizer
from optimize.job import Job

COMPARED = 1 << 22  # weights at a time: there are six numbers for each meanwhile
PROBE = (
    "The harbour was quiet that morning, and the boats lay still beside the wall.",
    "def add(a, b):\n    return a + b",
    "What is the capital of France?",
)


def checked(job: Job, names: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """How far the merged model is from base + adapters through PEFT: its logits, and its weights in units of bf16's
    last place, where rounding alone gives one half."""
    words, merged = tokenizer(Path(job.model)), Checkpoint(job.folder / "model")
    probes = [words(text).input_ids for text in PROBE]
    ids = torch.tensor([probe[: min(map(len, probes))] for probe in probes])
    folders = [Path(job.adapters[name]) for name in names]
    places = Places(merged)
    # PEFT has one adapter at a time for a module that is saved whole.
    saved = [folder for folder in folders if adapter_config(folder).get("modules_to_save")]
    merge = _one_by_one if saved and len(folders) > 1 else _layer_by_layer
    right = merge(Path(job.model), folders, weights, ids, places)
    gc.collect()  # PEFT's modules know one another: the model would stay beside the next one
    now = logits(opened(merged.folder, torch.float32, by_layer=True), ids)
    divergence = (right.softmax(-1) * (right.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean()
    return {
        "logits_off": round(float((now - right).abs().max()), 4),
        "kl_to_base_plus_adapter": round(float(divergence), 6),
        "weights_off_in_last_places": round(places.worst, 3),
    }


def off_in_places(made: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of two tensors in last places of bf16. Beside numbers below 1e-4 fp32's own rounding would
    be counted."""
    place = 2.0 ** (torch.frexp(exact.abs().clamp(min=1e-4)).exponent - 8)
    return float(((made.float() - exact).abs() / place).max())


class Places:
    """The largest difference of a merged weight from the exact one, in last places of bf16."""

    def __init__(self, merged: Checkpoint) -> None:
        self._merged = merged
        self.worst = 0.0

    def compare(self, name: str, exact: torch.Tensor) -> None:
        if name not in self._merged.entries:
            return
        few = max(1, COMPARED * len(exact) // exact.numel())
        for made, right in zip(self._merged.tensor(name).split(few), exact.split(few), strict=True):
            off = off_in_places(made, right)
            self.worst = off if off != off else max(self.worst, off)


def _layer_by_layer(
    base: Path, folders: Sequence[Path], weights: Sequence[float], ids: torch.Tensor, places: Places
) -> torch.Tensor:
    """The logits of base + adapters; every weight on the way is compared."""
    model: Any = opened(base, torch.float32, rounds=False, by_layer=True)
    decoder, inside = layers(model), prefix(model)
    owners = {name: module for name, module in model.named_modules() if module._parameters}
    tied = Checkpoint(base).tied
    wrapped = _wrapped(model, folders, weights)
    replaced = _replaced(wrapped)
    owners = {name: replaced.get(module, module) for name, module in owners.items()}
    for at, layer in enumerate(decoder):
        mine = {name: module for name, module in owners.items() if name.startswith(f"{inside}.{at}.")}
        layer.register_forward_pre_hook(_merging(mine, places))
        layer.register_forward_hook(_forgetting)
    for name, module in owners.items():
        if not name.startswith(f"{inside}.") and not tied:
            _compare_outside(name, module, wrapped, places)
    return logits(wrapped, ids)


def _merging(owners: dict[str, nn.Module], places: Places) -> Callable[..., None]:
    def hook(layer: nn.Module, *_: Any) -> None:
        for module in _lora(layer):
            module.merge(adapter_names=module.active_adapters)
        for name, module in owners.items():
            for part, parameter in module._parameters.items():
                if parameter is not None:
                    places.compare(f"{name}.{part}", parameter.detach().float())

    return hook


def _forgetting(layer: nn.Module, *_: Any) -> None:
    for module in _lora(layer):
        module.merged_adapters.clear()


def _lora(layer: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in layer.modules() if isinstance(module, LoraLayer)]


def _replaced(wrapped: nn.Module) -> dict[nn.Module, nn.Module]:
    """The modules of the base that an adapter saves whole, and what answers in their place."""
    from peft.utils import ModulesToSaveWrapper

    wrappers: list[Any] = [module for module in wrapped.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {wrapper.original_module: wrapper.modules_to_save[wrapper.active_adapters[0]] for wrapper in wrappers}


def _compare_outside(name: str, module: nn.Module, wrapped: nn.Module, places: Places) -> None:
    """Embedding, last norm and output layer, which stay as they are while the model runs."""
    exact = {f"{name}.{part}": parameter for part, parameter in module._parameters.items() if parameter is not None}
    for lora in _lora(wrapped):
        if lora.get_base_layer() is module:
            if lora.lora_variant:  # DoRA of an embedding: the logits are compared
                return
            update = sum(lora.get_delta_weight(active) for active in lora.active_adapters)
            exact[f"{name}.weight"] = exact[f"{name}.weight"] + update
    for parameter_name, parameter in exact.items():
        places.compare(parameter_name, parameter.detach().float())


def _wrapped(model: Any, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """The model with all adapters at once, each with its weight."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name="0", autocast_adapter_dtype=False)
        for at, folder in enumerate(folders[1:], 1):
            wrapped.load_adapter(folder, adapter_name=str(at), autocast_adapter_dtype=False)
        if len(folders) > 1:
            wrapped.base_model.set_adapter([str(at) for at in range(len(folders))])
    for module in _lora(wrapped):
        for at, weight in enumerate(weights):
            if str(at) in module.scaling:
                module.set_scale(str(at), weight)
    return wrapped.eval()


def _one_by_one(
    base: Path, folders: Sequence[Path], weights: Sequence[float], ids: torch.Tensor, places: Places
) -> torch.Tensor:
    """The same with the whole model in memory, merged into after each adapter."""
    model: Any = opened(base, torch.float32, rounds=False)
    right = torch.empty(0)
    for folder, weight in zip(folders, weights, strict=True):
        wrapped = _wrapped(model, [folder], [weight])
        right = logits(wrapped, ids)
        model = wrapped.merge_and_unload()
    tied = Checkpoint(base).tied
    for name, parameter in model.named_parameters():
        if not (tied and ("embed_tokens" in name or "lm_head" in name)):  # PEFT merges into both of a tied pair
            places.compare(name, parameter.detach())
    return right
