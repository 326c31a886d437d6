"""What a recipe would do, what it needs, and what stands in its way; said before any work, without torch.

Estimates come from the checkpoint's headers: parameters, bytes, layers. Times were measured on two cores of a server
CPU and scale with parameters and tokens; they are right within a factor of two there.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import Checkpoint, header
from optimize.checkpoint.linears import group, ignored, input_widths, linear, undivided
from optimize.errors import Refused
from optimize.recipe import KIND, Combine, Heal, Merge, Prune, Quantize, Recipe, plain

FLOPS = 2e11  # of a forward pass in bf16, two cores
STARTING = 8.0  # seconds until a child has imported torch and transformers
PROCESS = 700_000_000  # bytes of a child that has imported them
ZEROS = (
    "zeros buy neither size nor speed in today's vLLM: the checkpoint stays dense, and its kernels for 2:4 are gone; "
    "`layers`, `mlp` and `vocabulary` make a model smaller and faster"
)
EMBEDDING = "model.embed_tokens.weight"
SAME_RANK = {"linear"}  # methods that want adapters of one rank


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the plan."""

    kind: str
    what: str
    memory: int
    disk: int
    seconds: float
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The recipe against what is there. `key` is the digest of everything that decides the output's bytes."""

    model: Path
    adapters: dict[str, Path]
    texts: dict[str, str]
    steps: tuple[Step, ...]
    inputs: dict[str, Any]
    key: str

    @property
    def memory(self) -> int:
        return max(step.memory for step in self.steps)

    @property
    def disk(self) -> int:
        return sum(step.disk for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def made(recipe: Recipe, model: Path, texts: dict[str, str], out: Path, memory: int) -> Plan:
    """The plan, or Refused with the first thing that cannot be done."""
    base = Checkpoint(model)
    adapters = {name: Path(folder) for name, folder in recipe.adapters.items()}
    configs = {name: _adapter(name, folder, base) for name, folder in adapters.items()}
    _possible(recipe, base, configs)
    steps = tuple(_steps(recipe, base))
    inputs = {
        "model": artifact.contents(model),
        "adapters": {name: artifact.contents(folder) for name, folder in adapters.items()},
        "texts": texts,
    }
    settings = {name: value for name, value in plain(recipe).items() if name not in ("model", "adapters", "output")}
    kinds = [KIND[type(step)] for step in recipe.steps]
    plan = Plan(model, adapters, texts, steps, inputs, artifact.key([settings, kinds, inputs]))
    _room(plan, out, memory)
    return plan


def _steps(recipe: Recipe, base: Checkpoint) -> list[Step]:
    size, parameters = base.bytes, base.parameters
    calibrated = recipe.calibration.samples * recipe.calibration.tokens
    measured = recipe.evaluate.samples * recipe.evaluate.tokens
    pass_of = 2 * parameters / FLOPS  # seconds a token, forward
    largest = max(entry.bytes for entry in base.entries.values())
    widest = _widest(base)
    steps: list[Step] = []
    for step in recipe.steps:
        if isinstance(step, Merge):
            what = f"{', '.join(step.adapters)} into the base's weights, in fp32, shard by shard"
            what = f"take {base.folder.name} apart into full weights, then {what}" if base.quantization else what
            steps.append(Step("merge", what, PROCESS + 6 * largest + 4 * size, size, STARTING + size / 2e8 + 10))
        elif isinstance(step, Combine):
            what = f"{', '.join(step.adapters)} into one adapter, {step.name}, by {step.method}"
            steps.append(Step("combine", what, PROCESS + size // 2, size // 10, STARTING + 10))
        elif isinstance(step, Prune):
            steps.append(_pruning(step, base, calibrated))
        elif isinstance(step, Heal):
            seen = step.steps * step.batch * step.tokens
            what = "least squares, then " if step.repair else ""
            what += f"distil the original, LoRA of rank {step.rank}, {step.steps} x {step.batch} x {step.tokens} tokens"
            acts = step.batch * step.tokens * 160 * _hidden(base) * _layers(base) + 2048 * _vocabulary(base)
            acts += calibrated * (16 * _hidden(base) + 8 * widest) + 12 * widest * widest
            steps.append(Step("heal", what, PROCESS + 2 * size + acts, 2 * size, STARTING + 20 + 4 * seen * pass_of))
        elif isinstance(step, Quantize):
            seconds = STARTING + 4 * calibrated * pass_of + parameters / 4e6 if step.method != "rtn" else STARTING + 5
            what = f"{step.scheme}, {step.method if step.scheme[0] == 'w' else 'to the nearest'}"
            what += f", {step.format} format" if step.format != "compressed-tensors" else ""
            what += ", KV cache in fp8" if step.kv_cache == "fp8" else ""
            if step.budget or step.agreement:
                bounds = [f"perplexity rises by at most {step.budget:.1%}"] if step.budget else []
                bounds += [f"{step.agreement:.0%} of tokens stay the likeliest"] if step.agreement else []
                what += f", sensitive layers keep more bits until {' and '.join(bounds)}"
                probed = 8 * recipe.calibration.tokens * _vocabulary(base) * 6
                seconds = 2 * seconds + 4 * _layers(base) * min(calibrated, 4096) * pass_of / 2
            memory = PROCESS + size + calibrated * _hidden(base) * 4 + 12 * widest * widest
            memory += probed if step.budget or step.agreement else 0
            steps.append(Step("quantize", what, memory, int(size * 0.65), seconds, _slow(recipe, step)))
    if recipe.export.format == "genai":
        what = f"onnxruntime-genai's builder, {recipe.export.precision}, adapters beside it, checked against PyTorch"
        steps.append(Step("genai", what, PROCESS + 8 * size, 3 * size, STARTING + 90))
    if recipe.export.format == "onnx":
        what = f"ONNX {recipe.export.precision} with KV cache inputs, checked against PyTorch"
        steps.append(Step("onnx", what, PROCESS + 12 * size, 4 * size, STARTING + 90))
    living = len(recipe.adapters) - len(
        {name for step in recipe.steps if isinstance(step, Merge | Combine) for name in step.adapters}
    )
    seconds = STARTING + measured * pass_of * (2 + 2 * max(0, living))
    what = f"{measured} held-out tokens, KL, top-1, {len(recipe.evaluate.prompts)} answers" + (
        f", {living} adapters" if living > 0 else ""
    )
    logits = recipe.evaluate.tokens * _vocabulary(base) * 16
    steps.append(Step("evaluate", what, PROCESS + 2 * size + logits, 100_000, seconds))
    if recipe.evaluate.tasks:
        what = f"lm-eval on both models: {', '.join(Path(name).stem for name in recipe.evaluate.tasks)}"
        asked = (recipe.evaluate.task_limit or 1000) * len(recipe.evaluate.tasks) * 500 * pass_of
        steps.append(Step("tasks", what, PROCESS + size + 8 * logits, 100_000, 2 * STARTING + 2 * asked))
    if recipe.export.format == "vllm" and recipe.evaluate.engine:
        what = "both models in vLLM: load, answers, tokens/s at 1 and 16 streams"
        steps.append(Step("engine", what, 6 * PROCESS + 3 * size + (2 << 30), 100_000, 80))
    steps.append(Step("export", f"{recipe.export.format} directory, manifest, report", 0, size, size / 3e8))
    return steps


def _pruning(step: Prune, base: Checkpoint, calibrated: int) -> Step:
    size, seconds, memory = base.bytes, STARTING + base.bytes / 5e8, PROCESS + base.bytes + 50_000_000
    passes = 3 * calibrated * 2 * base.parameters / FLOPS
    if step.vocabulary:
        what = f"keep the {step.vocabulary} most used tokens" if step.vocabulary != "used" else "keep the used tokens"
        return Step("prune", what, memory, size, seconds + 10)
    if not step.zeros:
        what = f"drop {step.layers} layers by {step.choose} choice" if step.layers else f"MLP width to {step.mlp:.1%}"
        return Step("prune", what, memory, size, seconds + passes)
    what = f"{step.pattern or f'{step.sparsity:.0%}'} zeros by {step.method}"
    memory += calibrated * _hidden(base) * 4 + 12 * _widest(base) ** 2 + size
    return Step("prune", what, memory, size, seconds + passes + base.parameters / 4e6, ZEROS)


def _slow(recipe: Recipe, step: Quantize) -> str:
    if recipe.target == "cpu" and step.scheme == "w4a16":
        return "4-bit weights are smaller, and on a CPU without AMX slower than bf16"
    return WANTS.get(step.scheme, "")


def _possible(recipe: Recipe, base: Checkpoint, adapters: dict[str, dict[str, Any]]) -> None:
    """Refusals that need the model's and the adapters' headers."""
    kinds = {KIND[type(step)] for step in recipe.steps}
    if recipe.evaluate.tasks and find_spec("lm_eval") is None:
        raise Refused(
            "evaluate: tasks are scored by lm-eval, which is not installed: pip install 'loradock[lm-eval]', or leave "
            "`tasks` out"
        )
    if base.quantization is not None:
        first = next((step for step in recipe.steps if not isinstance(step, Combine)), None)
        if isinstance(first, Merge) and not first.requantize:
            raise Refused(
                f"{base.folder.name} is quantized already, and merging into rounded numbers rounds them twice: start "
                "from the original checkpoint, or accept that with `requantize: true` and a quantize step after it"
            )
        if first and not isinstance(first, Merge):
            raise Refused(
                f"{base.folder.name} is quantized already and {KIND[type(first)]} needs full weights: "
                "start from the original checkpoint"
            )
    for step in recipe.steps:
        if isinstance(step, Prune):
            if step.layers >= _layers(base):
                raise Refused(f"the model has {_layers(base)} layers, so {step.layers} cannot be dropped; drop fewer")
            if step.mlp < 1 and not any(".mlp.down_proj.weight" in name for name in base.shapes):
                raise Refused(
                    "the MLP of this model is not made of gate_proj, up_proj and down_proj; narrow it another way"
                )
            if step.pattern and (size := int(step.pattern.split(":")[1])) and undivided(base, size):
                raise Refused(f"{step.pattern} does not divide layers of width {undivided(base, size)}; take another M")
            if step.vocabulary != "used" and step.vocabulary >= _vocabulary(base):
                raise Refused(
                    f"the model has {_vocabulary(base)} tokens, so keeping {step.vocabulary} trims nothing; keep fewer"
                )
            living = set(adapters) - {
                name for other in recipe.steps if isinstance(other, Merge) for name in other.adapters
            }
            if living and not step.zeros and not step.vocabulary:
                raise Refused(
                    f"pruning changes the layers that the adapter {sorted(living)[0]!r} was trained on: "
                    "merge it first, or leave it out of `adapters:` and train it again on the result"
                )
        if isinstance(step, Quantize):
            _runs(recipe, step, base)
        if isinstance(step, Combine) and step.method in SAME_RANK:
            known = [name for name in step.adapters if name in adapters]
            ranks = {name: int(adapters[name]["r"]) for name in known}
            if len(set(ranks.values())) > 1:
                raise Refused(
                    f"combine by {step.method} wants adapters of one rank, these have {ranks}: take method svd or cat"
                )
        if isinstance(step, Combine):
            for name in step.adapters:
                config = adapters.get(name, {})
                if config.get("use_dora") or config.get("modules_to_save"):
                    raise Refused(
                        f"the adapter {name!r} is more than a low-rank update (DoRA or modules_to_save) "
                        "and cannot be combined: merge it into the base instead"
                    )
    if recipe.export.format == "genai":
        _builds(recipe, adapters)
    if recipe.export.format == "onnx":
        if "quantize" in kinds:
            raise Refused(
                "ONNX has its own int8 and int4: leave the quantize step out and say `export: {precision: int8}`"
            )
        if recipe.target == "gpu":
            raise Refused("the onnx export is checked on a CPU here: say `target: cpu`")


def _builds(recipe: Recipe, adapters: dict[str, dict[str, Any]]) -> None:
    """What onnxruntime-genai's builder does not take."""
    if find_spec("onnxruntime_genai") is None:
        raise Refused("the genai export needs onnxruntime-genai: pip install 'loradock[genai]', or say `format: onnx`")
    if recipe.target == "gpu":
        raise Refused("the genai export is checked on a CPU here: say `target: cpu`")
    gone = {name for step in recipe.steps if isinstance(step, Merge | Combine) for name in step.adapters}
    living = {name: config for name, config in adapters.items() if name not in gone}
    for step in recipe.steps:
        if isinstance(step, Quantize) and (step.format != "gptq" or living or recipe.export.precision != "int4"):
            raise Refused(
                "onnxruntime-genai takes a quantized model in GPTQ's format without adapters, as int4: say `quantize: "
                "{scheme: w4a16, format: gptq}` and `export: {precision: int4}`, or leave the quantize step out"
            )
    for name, config in living.items():
        if config.get("use_dora") or config.get("modules_to_save"):
            raise Refused(
                f"the adapter {name!r} is more than a low-rank update (DoRA or modules_to_save), which "
                "onnxruntime-genai does not take: merge it into the base"
            )


# What vLLM 0.32 has no kernel for on a CPU; it emulates most of it, too slowly to use.
NOT_ON_CPU = {
    "w8a16": "has no w8a16 kernel for CPUs",
    "fp8": "only emulates fp8 on CPUs, too slowly to use",
    "fp8-block": "only emulates fp8 on CPUs, too slowly to use",
    "nvfp4": "has NVFP4 for GPUs alone",
    "nvfp4a16": "has NVFP4 for GPUs alone",
    "mxfp4": "has MXFP4 for GPUs alone",
    "mxfp4a16": "has MXFP4 for GPUs alone",
}
WANTS = {
    "fp8": "wants a GPU with fp8: Ada, Hopper or later",
    "fp8-block": "wants a GPU with fp8: Ada, Hopper or later",
    "nvfp4": "wants Blackwell; older GPUs keep the weights small and do not round activations",
    "mxfp4": "wants Blackwell; older GPUs keep the weights small and do not round activations",
}
WIDTHS = {"fp8-block": 128, "nvfp4": 16, "nvfp4a16": 16, "mxfp4": 32, "mxfp4a16": 32}


def _runs(recipe: Recipe, step: Quantize, base: Checkpoint) -> None:
    """What the target's engine cannot run is refused before calibration."""
    if recipe.target == "cpu" and step.scheme in NOT_ON_CPU:
        raise Refused(f"vLLM {NOT_ON_CPU[step.scheme]}: take w8a8, or `target: gpu`")
    if recipe.target == "cpu" and step.kv_cache == "fp8" and not _avx512():
        raise Refused("vLLM's KV cache in fp8 wants AVX-512 on a CPU, and this one has none: leave `kv_cache` out")
    if step.scheme == "w4a16":
        if step.group and step.group % 32:
            raise Refused(
                f"groups of {step.group} do not fit: vLLM takes multiples of 32; leave `group` out to have one chosen"
            )
        group(base, step.group)
    size = WIDTHS.get(step.scheme, 1)
    if wrong := undivided(base, size):
        raise Refused(f"{step.scheme} rounds {size} numbers together, and the model has layers of width {wrong}")
    linears = {name.removesuffix(".weight") for name, shape in base.shapes.items() if linear(name, shape)}
    for pattern in step.ignore:
        if pattern != "lm_head" and not any(ignored(name, {pattern}) for name in linears):
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise Refused(f"ignore {pattern!r} names no layer of the model; there is {', '.join(leaves)}")


def _avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text()


def _adapter(name: str, folder: Path, base: Checkpoint) -> dict[str, Any]:
    """The adapter's config, after its tensors were held against the base's."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"the adapter {name!r} in {folder} has no readable adapter_config.json: {error}") from error
    if config.get("peft_type") != "LORA":
        raise Refused(f"the adapter {name!r} is {config.get('peft_type')}, and LORA is taken")
    if config.get("bias", "none") != "none":
        raise Refused(
            f"the adapter {name!r} trains biases ({config['bias']}), which cannot be merged faithfully: "
            "train with bias none"
        )
    for tensor, entry in header(folder / "adapter_model.safetensors").items():
        module, _, part = tensor.removeprefix("base_model.model.").partition(".lora_")
        weight = f"{module}.weight"
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


def _room(plan: Plan, out: Path, memory: int) -> None:
    if plan.memory > memory:
        need = max(plan.steps, key=lambda step: step.memory)
        raise Refused(
            f"{need.kind} needs about {need.memory / 1e9:.1f} GB of memory and has {memory / 1e9:.1f} GB; "
            "free some, or say --memory if you know better"
        )
    where = out.parent
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if plan.disk > free:
        raise Refused(
            f"{where} has {free / 1e9:.1f} GB free and this takes {plan.disk / 1e9:.1f} GB; "
            "free some, or name another --out"
        )


def available_memory() -> int:
    """Four fifths of what the machine has left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 * 4 // 5
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _layers(base: Checkpoint) -> int:
    return int(base.config.get("num_hidden_layers") or base.config.get("n_layer") or 1)


def _hidden(base: Checkpoint) -> int:
    return int(base.config.get("hidden_size") or base.config.get("n_embd") or 1)


def _vocabulary(base: Checkpoint) -> int:
    return int(base.config.get("vocab_size") or 1)


def _widest(base: Checkpoint) -> int:
    return max(input_widths(base), default=_hidden(base))
