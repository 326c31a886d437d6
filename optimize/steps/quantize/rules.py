"""What quantizing needs, and what the target's engine cannot run: refused before calibration."""

from __future__ import annotations

from optimize import processor
from optimize.checkpoint import architectures
from optimize.checkpoint.linears import group, ignored, linear, undivided
from optimize.errors import Refused
from optimize.options import Quantize
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate, beyond_low_rank

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
ROUNDING = 1e-7  # seconds a weight whose 4-bit scale is searched
FLOPS32 = 1.5e11  # of a product in fp32, two cores
WIDTHS = {"fp8-block": 128, "nvfp4": 16, "nvfp4a16": 16, "mxfp4": 32, "mxfp4a16": 32}


def estimate(step: Quantize, context: Context) -> Estimate:
    base, calibrated = context.base, context.calibration_tokens
    refits = step.refit and step.scheme == "w4a16" and "gptq" in step.method
    seconds = STARTING + base.parameters * (ROUNDING if step.scheme == "w4a16" else 2e-9)
    if step.method != "rtn":
        # A factor of each Hessian, then a sum over columns for each column; refitting takes 24 times as many.
        solved = context.layers * sum(width**3 for width in context.layer_inputs) / 3
        seconds += 4 * calibrated * context.token_seconds + 2 * solved / FLOPS32
        seconds += context.products * (25 if refits else 1) / FLOPS32
    # Hidden states before and after a layer, what a batch is inside one, and a layer that is rounded.
    batch = min(calibrated, 4 * context.recipe.calibration.tokens)
    memory = PROCESS + 4 * calibrated * context.hidden + 12 * batch * context.widest + 2 * context.largest_layer
    # A unit in fp32, turned around and its errors; where scales are fitted again what each number is pulled by, too.
    unit = (24 if refits else 16) * context.largest_unit
    if step.method != "rtn":
        memory += 4 * sum(width**2 for width in context.layer_inputs)
        unit = max(unit, 8 * context.widest**2 + unit // 2)
    memory += unit
    if step.mixed:
        memory += base.bytes
        seconds = 2 * seconds + 4 * context.layers * min(calibrated, 4096) * context.token_seconds / 2
        memory += 8 * context.recipe.calibration.tokens * context.vocabulary * 6
    return Estimate("quantize", _what(step), memory, int(base.bytes * 0.65), seconds, _warning(step, context))


def _what(step: Quantize) -> str:
    what = f"{step.scheme}, {step.method if step.scheme[0] == 'w' else 'to the nearest'}"
    what += f", {step.format} format" if step.format != "compressed-tensors" else ""
    what += ", KV cache in fp8" if step.kv_cache == "fp8" else ""
    if step.mixed:
        bounds = [f"perplexity rises by at most {step.budget:.1%}"] if step.budget else []
        bounds += [f"{step.agreement:.0%} of tokens stay the likeliest"] if step.agreement else []
        until = f"until {' and '.join(bounds)}" if bounds else f"as long as a weight takes {step.bits:g} bits"
        what += f", sensitive layers keep more bits {until}"
    return what


def _warning(step: Quantize, context: Context) -> str:
    if context.recipe.target == "cpu" and step.scheme == "w4a16":
        return "4-bit weights are smaller; in vLLM's layers, where the fused step does not run, slower than bf16"
    return WANTS.get(step.scheme, "")


def refuse(step: Quantize, context: Context) -> None:
    base, target = context.base, context.recipe.target
    architectures.dense(base.config, "quantize")
    if target == "cpu" and step.scheme in NOT_ON_CPU:
        raise Refused(f"vLLM {NOT_ON_CPU[step.scheme]}: take w8a8, or `target: gpu`")
    if target == "cpu" and step.kv_cache == "fp8" and "avx512f" not in processor.instruction_sets().split():
        raise Refused("vLLM's KV cache in fp8 wants AVX-512 on a CPU, and this one has none: leave `kv_cache` out")
    if step.scheme == "w4a16":
        if step.group and step.group % 32:
            raise Refused(
                f"groups of {step.group} do not fit: vLLM takes multiples of 32; leave `group` out to have one chosen"
            )
        size = group(base, step.group)
        if step.bits and step.bits < 4 + 16 / size:
            raise Refused(
                f"groups of {size} take {4 + 16 / size:g} bits a weight, and `bits` is {step.bits:g}: raise it, or "
                "take a larger `group`"
            )
    size = WIDTHS.get(step.scheme, 1)
    if widths := undivided(base, size):
        raise Refused(f"{step.scheme} rounds {size} numbers together, and the model has layers of width {widths}")
    linears = {name.removesuffix(".weight") for name, shape in base.shapes.items() if linear(name, shape)}
    for pattern in step.ignore:
        if pattern != "lm_head" and not any(ignored(name, {pattern}) for name in linears):
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise Refused(f"ignore {pattern!r} names no layer of the model; there is {', '.join(leaves)}")
    if step.smooth is True or step.scales_channels:
        _refuse_rescaling(context)


def _refuse_rescaling(context: Context) -> None:
    """Adapters that scaled channels cannot be folded into."""
    for name in sorted(context.living & set(context.adapters)):
        if beyond_low_rank(context.adapters[name]):
            raise Refused(
                f"smoothing and AWQ scale channels, and the adapter {name!r} is more than a low-rank update (DoRA or "
                "modules_to_save), which does not follow them: say `smooth: false` and another method"
            )
