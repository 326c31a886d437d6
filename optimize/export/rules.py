"""What each export format needs, and what it does not take."""

from __future__ import annotations

from importlib.util import find_spec

from optimize.errors import Refused
from optimize.options import Quantize
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate, beyond_low_rank


def estimates(context: Context) -> list[Estimate]:
    """The step that makes the format, where it takes one."""
    export, size = context.recipe.export, context.base.bytes
    if export.format == "genai":
        what = f"onnxruntime-genai's builder, {export.precision}, adapters beside it, checked against PyTorch"
        return [Estimate("genai", what, PROCESS + 8 * size, 3 * size, STARTING + 90)]
    if export.format == "onnx":
        what = f"ONNX {export.precision} with KV cache inputs, checked against PyTorch"
        return [Estimate("onnx", what, PROCESS + 12 * size, 4 * size, STARTING + 90)]
    return []


def refuse(context: Context) -> None:
    recipe = context.recipe
    if recipe.export.format == "genai":
        _refuse_genai(context)
    if recipe.export.format == "onnx":
        if any(isinstance(step, Quantize) for step in recipe.steps):
            raise Refused(
                "ONNX has its own int8 and int4: leave the quantize step out and say `export: {precision: int8}`"
            )
        if recipe.target == "gpu":
            raise Refused("the onnx export is checked on a CPU here: say `target: cpu`")


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
    for name, config in context.adapters.items():
        if name in living and beyond_low_rank(config):
            raise Refused(
                f"the adapter {name!r} is more than a low-rank update (DoRA or modules_to_save), which "
                "onnxruntime-genai does not take: merge it into the base"
            )
