"""What measuring needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from msgspec.structs import replace

from optimize.errors import Refused
from optimize.options import Step
from optimize.steps.planning import LOADED, READ, Context, Estimate, by_layer, weight_bytes

IMPORTS = 15.0  # seconds of lm-eval's own
ENGINE = 700_000_000  # bytes of each of vLLM's processes beside the model
PASSES = 5  # over the logits of a window, which are compared
ANSWER = 32  # tokens
AROUND = 3  # models that an adapter is put around
ADAPTED = 8  # windows that adapters are measured on
# Of the model's bytes in 16 bits, what ONNX Runtime holds of it by precision.
ONNX_SHARE = {"fp32": 2.0, "fp16": 1.0, "int8": 0.6, "int4": 0.35}


def estimates(context: Context) -> list[Estimate]:
    """The steps that measure, in their order."""
    recipe, size = context.recipe, context.base.bytes
    tokens, living = recipe.evaluate.samples * recipe.evaluate.tokens, len(_measured(context))
    what = f"{tokens} held-out tokens, KL, top-1, {len(recipe.evaluate.prompts)} answers"
    what += f", {living} adapters" if living else ""
    logits = recipe.evaluate.tokens * context.vocabulary * (40 if living else 10)
    memory = context.machine.process + logits + _weights(context, tokens)
    estimates = [Estimate("evaluate", what, memory, 100_000, _seconds(context))]
    if recipe.evaluate.tasks:
        what = f"lm-eval on both models: {', '.join(Path(name).stem for name in recipe.evaluate.tasks)}"
        answers = (recipe.evaluate.task_limit or 1000) * len(recipe.evaluate.tasks) * 500 * context.token_seconds
        estimates.append(
            Estimate("tasks", what, context.machine.process + size + 8 * logits, 100_000, IMPORTS + 2 * answers)
        )
    if recipe.export.format == "vllm" and recipe.evaluate.engine:
        what = "both models in vLLM: load, answers, tokens/s at 1 and 16 streams"
        estimates.append(Estimate("engine", what, 3 * ENGINE + 3 * size + (2 << 30), 100_000, 100))
    return estimates


def _seconds(context: Context) -> float:
    recipe, machine = context.recipe, context.machine
    tokens, living = recipe.evaluate.samples * recipe.evaluate.tokens, len(_measured(context))
    own = living * 4 * min(ADAPTED * recipe.evaluate.tokens, tokens)
    compared = PASSES * machine.number * context.vocabulary * (tokens + own)
    step = context.layers * machine.answering + machine.reading * context.vocabulary * context.hidden
    answers = ANSWER * step * (2 + living) if recipe.evaluate.prompts else 0.0
    merged = any(_merges(step) for step in recipe.steps)  # the base alone is measured too
    models = (1 if _same(context) else 2) + merged
    read = LOADED * machine.number * (models * context.copied / 4 + _quantizes(context) * context.linears)
    read += models * context.base.bytes / READ
    begun = machine.evaluation_text + (models + AROUND * living) * machine.opening + read
    rounded = any(step.rounds_inputs for step in recipe.steps) * context.inputs * machine.rounded_input
    read_text = context.token_seconds * ((2 + merged) * tokens + own)
    if recipe.export.format == "onnx":  # reads all with the result's weights, and answers one prompt after another
        weights = context.linears + context.vocabulary * context.hidden
        begun += machine.onnx_opening * weights
        read_text += (machine.onnx_reading * weights - context.token_seconds) * tokens
        answers += ANSWER * len(recipe.evaluate.prompts) * machine.onnx_answering * weights
    return begun + read_text + rounded * (tokens + own / 2) + compared + answers


def _measured(context: Context) -> set[str]:
    """The adapters that are measured on the result: those of an ONNX export are compared as it is made."""
    return set() if context.recipe.export.format == "onnx" else context.living


def _merges(step: Step) -> bool:
    return bool(step.consumed) and not step.makes


def _same(context: Context) -> bool:
    """Whether the result is what it is compared with: adapters were merged, or nothing was done."""
    return not context.living and context.recipe.export.format == "vllm" and all(map(_merges, context.recipe.steps))


def _quantizes(context: Context) -> bool:
    """Whether the result is held as the numbers that its integers stand for."""
    return context.recipe.export.format == "vllm" and any(step.quantizes for step in context.recipe.steps)


def _weights(context: Context, tokens: int) -> int:
    """Bytes of weights and of what stands beside them; those that are computed with as they are on the disk take
    none."""
    size, layer = weight_bytes() * context.weights, weight_bytes() * context.largest_layer
    quantizes = _quantizes(context)
    export = context.recipe.export
    onnx = ONNX_SHARE[export.precision] * 2 * context.weights if export.format == "onnx" else 0
    models = 1 if onnx or _same(context) else 2  # the original, and the result unless ONNX Runtime holds it
    if by_layer(size, context.memory):
        # A layer, and the hidden states of all the text.
        outside = models * weight_bytes() * context.outside_layers if context.copied else 0
        return int(onnx) + (layer if quantizes or context.copied else 0) + outside + 8 * tokens * context.hidden
    if context.copied:
        return int(onnx) + context.copied * models
    return int(onnx) + (weight_bytes() * context.linears if quantizes else 0)


def refuse(context: Context) -> None:
    if context.recipe.evaluate.tasks and find_spec("lm_eval") is None:
        raise Refused(
            "evaluate: tasks are scored by lm-eval, which is not installed: pip install 'loradock[lm-eval]', or leave "
            "`tasks` out"
        )
    if not context.recipe.trains_alone:
        context.refuse_too_little(context.recipe.evaluate, "evaluate")
        for name in sorted(_measured(context) & set(context.recipe.evaluate.adapter_texts)):
            own = context.recipe.evaluate.adapter_texts[name]
            part = replace(context.recipe.evaluate, text=own, samples=ADAPTED)
            context.refuse_too_little(part, f"evaluate: adapter_texts: {name}")
