"""What a recipe will do, what it needs, and why it is refused, before any work and without torch.

Estimates come from the checkpoint's headers and from what the machine takes for a layer of it. The rules of a step are
beside the step (`steps/*/rules.py`); those of the whole recipe are here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from optimize import processor
from optimize.checkpoint import architectures, artifact, lora_config
from optimize.checkpoint.checkpoint import ADAPTER, ADAPTER_CONFIG, Checkpoint, adapter_config, header
from optimize.errors import Refused
from optimize.evaluation import rules as evaluation
from optimize.export import rules as export
from optimize.options import Step, plain
from optimize.pipeline import device, step_code
from optimize.pipeline.worker import TASKS
from optimize.recipe import Recipe
from optimize.steps.kind import kinds
from optimize.steps.merge.rules import Merge
from optimize.steps.planning import Context, Estimate, Machine

EMBEDDING = "model.embed_tokens.weight"
# One of them is a tokenizer's; in order of how usual they are.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class Plan:
    """The recipe against what is there. `key` is the digest of everything that decides the output's bytes."""

    model: Path
    adapters: dict[str, Path]
    texts: dict[str, str]
    steps: tuple[Estimate, ...]
    inputs: dict[str, Any]
    key: str
    bytes: int  # of the base
    note: str = ""  # of how it was measured

    @property
    def memory(self) -> int:
        return max(step.memory for step in self.steps)

    @property
    def disk(self) -> int:
        return sum(step.disk for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def made(
    recipe: Recipe,
    model: Path,
    texts: dict[str, str],
    out: Path,
    memory: int,
    measured: Callable[[], Machine] = Machine,
) -> Plan:
    """The plan, or Refused with the first thing that cannot be done; only then the machine is `measured`."""
    base = Checkpoint(model)
    adapters = {name: Path(folder) for name, folder in recipe.adapters.items()}
    configs = {name: _adapter(name, folder, base) for name, folder in adapters.items()}
    context = Context(recipe, base, configs, memory)
    _refuse(context)
    _refuse_without_tokenizer(model)
    place = _place(out)
    inputs = {
        "model": artifact.contents(model),
        "adapters": {name: artifact.contents(folder) for name, folder in adapters.items()},
        "texts": texts,
    }
    settings = {name: value for name, value in plain(recipe).items() if name not in ("model", "adapters", "output")}
    settings["steps"] = [by_content(step) for step in recipe.steps]
    names = [step.kind for step in recipe.steps]
    machine = measured()
    estimates = _estimates(replace(context, machine=machine))
    code = [step_code.of(step.kind, plain(step)) for step in recipe.steps]
    code += [step_code.of(estimate.kind) for estimate in estimates if estimate.kind in TASKS]
    gpu = processor.gpu() if recipe.device != device.CPU else None
    key = artifact.key([settings, names, inputs, processor.arithmetic(), code, *([gpu.name] if gpu else [])])
    plan = Plan(model, adapters, texts, estimates, inputs, key, base.bytes, machine.note)
    _room(plan, place, memory)
    return plan


def _estimates(context: Context) -> tuple[Estimate, ...]:
    recipe, size = context.recipe, context.base.bytes
    return (
        *(_estimate(step, context) for step in recipe.steps),
        *export.estimates(context),
        *([] if recipe.trains_alone else evaluation.estimates(context)),
        Estimate("export", f"{recipe.export.format} directory, manifest, report", 0, size, size / 3e8),
    )


def _estimate(step: Step, context: Context) -> Estimate:
    estimate: Estimate = kinds()[step.kind].estimate(step, context)
    return replace(estimate, warning="; ".join(filter(None, [estimate.warning, *step.retired_sentences])))


def _refuse(context: Context) -> None:
    device.check(context.recipe)
    architectures.refuse_multimodal(context.base.config)
    _refuse_biases(context)
    evaluation.refuse(context)
    if context.base.quantization is not None:
        _refuse_rounded_twice(context)
    for step in context.recipe.steps:
        kinds()[step.kind].refuse(step, context)
    export.refuse(context)


def _refuse_without_tokenizer(model: Path) -> None:
    """Every recipe reads some text in the model's tokens."""
    if not any((model / name).is_file() for name in TOKENIZERS) and not [
        *model.glob("*.tiktoken"),
        *model.glob("*.model*"),
    ]:
        raise Refused(
            f"{model} has no tokenizer ({', '.join(TOKENIZERS[:3])} ...): copy the files of the model's tokenizer there"
        )
    file = model / TOKENIZERS[0]
    try:
        whole = isinstance(json.loads(file.read_text()), dict) if file.is_file() else True
    except ValueError:
        whole = False
    if not whole:
        raise Refused(f"{file} is not the JSON that a tokenizer is: fetch the model's again")


def _refuse_rounded_twice(context: Context) -> None:
    """A quantized model has no full weights for the first step that changes it."""
    base, steps = context.base, context.recipe.steps
    first = next((step for step in steps if not step.makes), None)
    if isinstance(first, Merge) and not first.requantize:
        raise Refused(
            f"{base.folder.name} is quantized already, and merging into rounded numbers rounds them twice: start "
            "from the original checkpoint, or accept that with `requantize: true` and a quantize step after it"
        )
    if first and not isinstance(first, Merge):
        raise Refused(
            f"{base.folder.name} is quantized already and {first.kind} needs full weights: "
            "start from the original checkpoint"
        )


def by_content(step: Step) -> dict[str, Any]:
    """A step's options, with the digest of a file's bytes where its name is."""
    options = plain(step)
    return options | {name: artifact.digest(Path(options[name])) for name in step.files if options[name]}


def _refuse_biases(context: Context) -> None:
    """vLLM takes no adapter with biases of its own."""
    for name in sorted(context.living & set(context.adapters)):
        if context.adapters[name].get("lora_bias") and context.recipe.export.format == "vllm":
            raise Refused(
                f"the adapter {name!r} has biases beside its B matrices (lora_bias), which vLLM does not take: "
                "merge it into the base"
            )


def _adapter(name: str, folder: Path, base: Checkpoint) -> dict[str, Any]:
    """The adapter's config, after its tensors were held against the base's."""
    try:
        config = adapter_config(folder)
    except (OSError, ValueError) as error:
        raise Refused(f"the adapter {name!r} in {folder} has no readable {ADAPTER_CONFIG}: {error}") from error
    if config.get("peft_type") != "LORA":
        raise Refused(
            f"the adapter {name!r} is {config.get('peft_type')}, and LORA is taken: a server makes a LoRA of most "
            "kinds (`loradock adapters push`, then `pull`)"
        )
    if config.get("bias", "none") != "none":
        raise Refused(
            f"the adapter {name!r} trains biases ({config['bias']}), which cannot be merged faithfully: "
            "train with bias none"
        )
    entries = header(folder / ADAPTER)
    if why := next(chain(lora_config.problems(config), lora_config.tensor_problems(config, entries)), ""):
        raise Refused(f"the adapter {name!r} cannot be computed as a LoRA: {why}")
    for tensor, entry in entries.items():
        module, _, part = tensor.removeprefix("base_model.model.").partition(".lora_")
        weight = f"{module}.weight"
        if part == "B.bias" and f"{module}.bias" not in base.shapes:
            raise Refused(
                f"the adapter {name!r} has a bias for {module} (lora_bias), and this base has none there to add it to: "
                "train without lora_bias"
            )
        if not part:
            saved = base.shapes.get(module) or base.shapes.get(EMBEDDING if module.startswith("lm_head") else "")
            if saved and entry.shape != saved and ".base_layer." not in module:
                raise Refused(
                    f"the adapter {name!r} is for another base: it saves {module} as {list(entry.shape)}, this one has "
                    f"{list(saved)}"
                )
            continue
        if weight not in base.shapes and not (module == "lm_head" and base.tied):
            raise Refused(f"the adapter {name!r} is for another base: this one has no {module}")
        shape = base.shapes.get(weight, base.shapes.get(EMBEDDING, entry.shape))
        fits = {"A.weight": entry.shape[-1] in shape, "B.weight": entry.shape[0] in shape}.get(part, True)
        if not fits:
            raise Refused(
                f"the adapter {name!r} is for another base: {tensor} is {list(entry.shape)}, {module} is {list(shape)}"
            )
    return config


def _place(out: Path) -> Path:
    """The folder, of those above the output, that is there; Refused where nothing can be made in it."""
    where = out.parent
    while not where.exists():
        where = where.parent
    if not where.is_dir() or not os.access(where, os.W_OK | os.X_OK):
        why = "is a file" if where.is_file() else "cannot be written to"
        raise Refused(f"{out} cannot be made: {where} {why}; name another place with --out")
    return where


def _room(plan: Plan, where: Path, memory: int) -> None:
    if plan.memory > memory:
        need = max(plan.steps, key=lambda step: step.memory)
        raise Refused(
            f"{need.kind} needs about {need.memory / 1e9:.1f} GB of memory and has {memory / 1e9:.1f} GB; "
            "free some, or say --memory if you know better"
        )
    free = shutil.disk_usage(where).free
    if plan.disk > free:
        raise Refused(
            f"{where} has {free / 1e6:,.1f} MB free and this takes {plan.disk / 1e6:,.1f} MB; "
            "free some, or name another --out"
        )
