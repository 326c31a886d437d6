"""What each export format needs, and what it does not take."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from optimize.checkpoint import architectures
from optimize.checkpoint.checkpoint import ADAPTER, Checkpoint, header
from optimize.errors import Refused
from optimize.export import gguf_metadata, layout, optimum
from optimize.steps.planning import LOADED, Context, Estimate, beside_products, by_layer, following, passing
from optimize.steps.quantize.rules import Quantize

# A weight that is multiplied with, and its share of a scale; tables and output layers have 8 bits where it has fewer.
BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.125, "int4": 0.625}
# A graph takes so many times as long as torch takes to trace a layer, for its beginning and for each layer, and leaves
# so many bytes of Python's objects.
STARTED, TRACED = 15, 12
GRAPH, GRAPH_OF_LAYER = 100_000_000, 8_000_000
HELD = 1 << 25  # weights that are rounded at a time
# Of GGUF files.
GGUF_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q6_k": 0.82, "q4_0": 0.5625, "q4_k_m": 0.65}


def streams(base: Checkpoint) -> bool:
    """Whether the graph is made without the matrices: the checkpoint has each by the name that the model has."""
    return not any(".experts." in name for name in base.shapes)


def estimates(context: Context) -> list[Estimate]:
    """The step that makes the format, where it takes one."""
    export, size = context.recipe.export, context.base.bytes
    if export.format == "genai":
        what = f"onnxruntime-genai's builder, {export.precision}, adapters beside it, checked against PyTorch"
        return [Estimate("genai", what, context.machine.process + 8 * size, 3 * size, 95.0)]
    if export.format == "gguf":
        made = int(GGUF_BYTES.get(export.precision, 4.0) * context.weights)
        what = f"a GGUF file, {export.precision}{', by GPTQ' * export.calibrates}, adapters beside it"
        # Several scales are tried for each group.
        seconds = context.machine.opening + 2 * context.machine.scale * context.weights
        memory = context.machine.process + 12 * context.vocabulary * context.hidden
        if export.calibrates:
            calibrated, hessians = following(context)
            seconds += context.machine.calibration_text + calibrated
            memory = max(memory, context.machine.process + hessians + passing(context) + context.copied_by_layer)
        return [Estimate("gguf", what, memory, 2 * made + 2 * context.weights, seconds)]
    if export.format == "onnx":
        by = " by optimum" if export.exporter == "optimum" else ""
        what = f"ONNX {export.precision}{by} with KV cache inputs, adapters beside it, checked against PyTorch"
        return [Estimate("onnx", what, *_onnx(context), _graph(context))]
    return []


def _graph(context: Context) -> float:
    """Seconds of exporting the graph, which goes by its layers, of rounding and of the comparison."""
    machine = context.machine
    written = machine.onnx_rounding + machine.onnx_opening + LOADED * machine.number
    return machine.tracing * (STARTED + TRACED * context.layers) + written * context.weights


def _onnx(context: Context) -> tuple[int, int]:
    """Bytes of memory and of disk."""
    export, base = context.recipe.export, context.base
    weights, table = context.weights, context.vocabulary * context.hidden
    tables = table if base.tied else 2 * table  # the table of tokens and the output layer
    rounded = BYTES["int8"] if export.precision in ("int8", "int4") else 4.0
    made = int(rounded * tables + BYTES[export.precision] * (weights - tables))
    if export.exporter == "optimum" or not streams(base):
        return (
            context.machine.process + 24 * weights,
            8 * weights + made,
        )  # in fp32 for the exporter, in its graph and once more
    whole = 4 * weights
    # PyTorch's logits, of the whole model or of a layer at a time, come when ONNX Runtime's are there.
    check = 8 * context.largest_layer + 4 * context.outside_layers if by_layer(whole, context.memory) else whole
    written = 8 * min(table, HELD) + 2 * int(BYTES["int8"] * table)  # some rows, and all that they become
    graph = GRAPH + GRAPH_OF_LAYER * context.layers
    memory = context.machine.process + graph + max(made, check, written)
    return (memory + whole, whole + made) if export.precision == "fp16" else (memory, made)


def refuse(context: Context) -> None:
    recipe = context.recipe
    if recipe.export.format == "vllm":
        _refuse_vllm(context)
    if recipe.export.format == "genai":
        _refuse_genai(context)
    if recipe.export.format == "onnx":
        _refuse_onnx(context)
    if recipe.export.calibrates and not (recipe.export.format == "gguf" and recipe.export.rounds):
        raise Refused(
            "`method: gptq` is of GGUF files whose matrices are rounded (`format: gguf, precision: q4_k_m`); for vLLM "
            "say `quantize: {method: gptq}`"
        )
    if recipe.export.format == "gguf":
        _refuse_gguf(context)
    elif recipe.export.precision not in BYTES:
        raise Refused(f"`precision: {recipe.export.precision}` is of GGUF files: say `format: gguf`")
    if recipe.export.format in ("vllm", "adapter") and recipe.export.precision != "fp32":
        raise Refused(
            f"`precision: {recipe.export.precision}` is of the formats onnx, genai and gguf, and a "
            f"{recipe.export.format} export would not be rounded: leave it out, and for vLLM say `quantize: {{scheme: "
            "w8a8}` in `steps`"
        )
    if recipe.export.format != "onnx" and recipe.export.exporter == "optimum":
        raise Refused(f"`exporter: optimum` writes ONNX graphs, and no {recipe.export.format} export: leave it out")


def _refuse_vllm(context: Context) -> None:
    """What vLLM does not run, or computes otherwise than the model's own code."""
    config, family = context.base.config, architectures.known(context.base.config)
    parts = [name for name in family.unread if config.get(name)] if family else []
    if family and parts:
        raise Refused(
            f"vLLM leaves out what this {family.name} model has ({', '.join(parts)}), and would answer wrongly: say "
            "`export: {format: onnx}`"
        )
    if family and not family.adaptable and context.living:
        raise Refused(
            f"vLLM takes no adapters on {family.name}: merge {', '.join(sorted(context.living))} into the base"
        )
    if family is None:
        return
    for name in sorted(context.living & set(context.adapters)):
        if modules := {*(context.adapters[name].get("target_modules") or ())}.intersection(family.unadapted):
            raise Refused(
                f"the adapter {name!r} is on {min(modules)}, where vLLM takes none on {family.name}: merge it into the "
                "base, or train it on the other modules"
            )


def _refuse_onnx(context: Context) -> None:
    recipe = context.recipe
    if any(step.quantizes for step in recipe.steps):
        raise Refused("ONNX has its own int8 and int4: leave the quantize step out and say `export: {precision: int8}`")
    architectures.readable(context.base.config, context.base.shapes, "the onnx export")
    if recipe.target == "gpu":
        raise Refused("the onnx export is checked on a CPU here: say `target: cpu`")
    if layout.rope_type(context.base.config) == "dynamic":
        raise Refused("the model's rope changes with the length of the text (dynamic), which an ONNX graph cannot")
    _refuse_beside_products(context, "an ONNX graph")
    kind = context.base.config.get("model_type")
    if recipe.export.exporter == "optimum" and kind not in optimum.families():
        raise Refused(
            f"optimum's exporter does not take models of type {kind!r}: leave `exporter: optimum` out, and "
            "transformers' own writes the graph"
        )


def _refuse_gguf(context: Context) -> None:
    """What no GGUF file is made of here."""
    recipe, base = context.recipe, context.base
    if find_spec("gguf") is None:
        raise Refused("a GGUF file is written by the package gguf: pip install 'loradock[cpu]' or 'loradock[gpu]'")
    if recipe.export.precision not in GGUF_BYTES:
        raise Refused(f"a GGUF file has no {recipe.export.precision}: say one of {', '.join(GGUF_BYTES)}")
    if any(step.quantizes for step in recipe.steps) or base.quantization is not None:
        raise Refused("a GGUF file has its own 4 and 8 bits: leave the quantize step out and say `precision: q4_k_m`")
    if reason := gguf_metadata.reason_against(base.config, base.folder / "tokenizer.json"):
        raise Refused(f"{reason}: say `format: vllm`")
    if recipe.export.calibrates:
        architectures.dense(base.config, "calibration")
        context.refuse_too_little(recipe.calibration, "calibration")
    _refuse_beside_products(context, "a GGUF file")
    for name in sorted(context.living & set(context.adapters)):
        tensors = header(Path(recipe.adapters[name]) / ADAPTER)
        if base.tied and any("lm_head." in tensor for tensor in tensors):
            raise Refused(
                f"the adapter {name!r} adapts the output layer, which is the embedding in this base, so that a GGUF "
                "file has none of its own: merge it into the base"
            )


def _refuse_beside_products(context: Context, what: str) -> None:
    for name in sorted(context.living & set(context.adapters)):
        if reason := beside_products(context, name):
            raise Refused(f"the adapter {name!r} {reason}, which {what} does not take: merge it into the base")


def _refuse_genai(context: Context) -> None:
    """What onnxruntime-genai's builder does not take."""
    recipe = context.recipe
    if find_spec("onnxruntime_genai") is None:
        raise Refused("the genai export needs onnxruntime-genai: pip install 'loradock[genai]', or say `format: onnx`")
    if recipe.target == "gpu":
        raise Refused("the genai export is checked on a CPU here: say `target: cpu`")
    living = context.living
    for step in recipe.steps:
        if isinstance(step, Quantize) and (step.format != "gptq" or living or recipe.export.precision != "int4"):
            raise Refused(
                "onnxruntime-genai takes a quantized model in GPTQ's format without adapters, as int4: say `quantize: "
                "{scheme: w4a16, format: gptq}` and `export: {precision: int4}`, or leave the quantize step out"
            )
    _refuse_beside_products(context, "onnxruntime-genai")
