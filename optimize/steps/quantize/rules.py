"""What quantizing needs, and what the target's engine cannot run: refused before calibration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from optimize import processor
from optimize.checkpoint import architectures
from optimize.checkpoint.linears import group, ignored, linear, undivided
from optimize.errors import RecipeError, Refused
from optimize.options import Step
from optimize.steps.kind import StepKind
from optimize.steps.planning import GRID, MOVED, Context, Estimate, beyond_low_rank, passing, writing
from optimize.steps.quantize.method import methods

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
PASSES = 20  # over each weight that is rounded, packed and written
SCALED = 15  # over each weight whose channels are scaled
TRIED_SCALE = 10  # over each weight in a try of AWQ
PROBED = 256  # tokens that sensitivity is measured on
TRIED = 8  # windows that a choice of levels is tried on
MIXES = 3  # that are tried, as a rule, where the lowest level is not enough
WIDTHS = {"fp8-block": 128, "nvfp4": 16, "nvfp4a16": 16, "mxfp4": 32, "mxfp4a16": 32}


class Quantize(Step, frozen=True, kw_only=True, tag="quantize"):
    """Fewer bits. With mixed precision sensitive layers keep more: `budget` is what perplexity may rise by, `agreement`
    the least share of tokens that stay the likeliest.

    `bits` is how many a weight may take on average, scales included, instead of a bound on what is lost. `method` names
    a module of `methods/`, or another package's; `gptaq` is GPTQ that makes up for what the layers before have changed,
    and `awq-gptq` is that with AWQ's scales of channels.
    `format` gptq is for w4a16, and onnxruntime-genai's builder takes it too; `ignore` holds names of layers, their last
    words, or `re:` patterns.
    """

    quantizes: ClassVar[bool] = True
    after_quantizing: ClassVar[str] = "the model is quantized already; one quantize step does all"
    retired: ClassVar[Mapping[str, str]] = {
        "refit": "`refit` does nothing any more: it took up to four times the time for a thousandth of the perplexity"
    }
    scheme: Literal["w8a8", "w8a16", "w4a16", "fp8", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"] = "w8a8"
    method: str = "gptq"
    refit: bool = False
    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    kv_cache: Literal["auto", "fp8"] = "auto"
    smooth: bool | Literal["auto"] = "auto"
    group: int = 0
    budget: float = 0.0
    agreement: float = 0.0
    bits: float = 0.0
    ignore: tuple[str, ...] = ("lm_head",)

    @property
    def rounds_inputs(self) -> bool:
        return not self.scheme.endswith("a16")

    @property
    def mixed(self) -> bool:
        return bool(self.budget or self.agreement or self.bits)

    @property
    def scales_channels(self) -> bool:
        """Whether the method's scales are folded into what makes a layer's input."""
        return methods()[self.method].scales is not None

    def check(self, where: str) -> None:
        if self.method not in methods():
            raise RecipeError(f"{where}: method takes one of {', '.join(methods())}, not {self.method!r}")
        if self.scheme != "w4a16" and (self.scales_channels or methods()[self.method].follows or self.format == "gptq"):
            raise RecipeError(f"{where}: AWQ, gptaq and the format gptq go with w4a16, not {self.scheme}")
        if self.scales_channels and self.smooth is True:
            raise RecipeError(f"{where}: AWQ scales the channels itself; leave `smooth` out")
        if self.format == "gptq" and (self.mixed or self.kv_cache == "fp8"):
            raise RecipeError(
                f"{where}: the format gptq knows one precision and no KV cache; leave budget, agreement, bits and "
                "kv_cache out"
            )
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise RecipeError(f"{where}: ignore {pattern!r} is no regular expression: {error}") from error
        if not (self.budget >= 0 and 0 <= self.agreement < 1):
            raise RecipeError(f"{where}: budget is a share at least 0, agreement one from 0 to below 1")
        if self.mixed and self.scheme not in ("w4a16", "w8a8"):
            raise RecipeError(f"{where}: budget, agreement and bits go with w4a16 or w8a8, not {self.scheme}")
        if self.bits and (self.budget or self.agreement):
            raise RecipeError(f"{where}: bits bounds the size, budget and agreement what is lost: give one of them")
        if self.bits and not (4 < self.bits < 16 if self.scheme == "w4a16" else 8 < self.bits < 16):
            low = 4 if self.scheme == "w4a16" else 8
            raise RecipeError(
                f"{where}: bits a weight are above {low} and below 16 for {self.scheme}, not {self.bits:g}"
            )


def estimate(step: Quantize, context: Context) -> Estimate:
    base, calibrated = context.base, context.calibration_tokens
    calibrating, memory = methods()[step.method].estimated(step, context)
    machine = context.machine
    rounding = context.linears * (machine.scale if step.scheme == "w4a16" else 0)
    rounding += PASSES * machine.number * context.linears
    passes = 1 + methods()[step.method].calibrates  # what the rounded layers give, and what Hessians are made of
    rounding += calibrated * context.layers_seconds
    rounding += passes * calibrated * context.inputs * machine.rounded_input if step.rounds_inputs else 0.0
    scaling = _scaling(step, context)
    seconds = machine.calibration_text + machine.opening + calibrating + rounding + scaling
    memory += context.machine.process + passing(context)
    if scaling:  # logits before and after, with what they are compared by
        moving = max(8 * context.largest_layer, 12 * MOVED * context.vocabulary)
        memory = max(memory, machine.process + moving)
    memory += context.copied if step.mixed else context.copied_by_layer
    if step.mixed:
        memory += base.bytes
        seconds += _mixing(step, context, calibrating / context.recipe.calibration.samples, rounding)
        memory += 8 * context.recipe.calibration.tokens * context.vocabulary * 6
    made = int(base.bytes * 0.65)
    return Estimate("quantize", _what(step), memory, made, seconds + writing(made), _warning(step, context))


def _scaling(step: Quantize, context: Context) -> float:
    """Seconds that scales of channels take: the text goes through each layer once, and weights are scaled, twice; what
    that moves is seen in float32. AWQ makes Hessians, with which it multiplies each of its tries."""
    machine, tokens = context.machine, context.calibration_tokens
    smooths = step.scheme == "w8a8" or (step.mixed and context.recipe.target == "cpu")
    if not step.scales_channels and not (smooths and _smooth(step, context)):
        return 0.0
    seconds = tokens * context.layers_seconds
    seconds += (SCALED * machine.number + 2 * MOVED * machine.product32) * context.linears
    if step.scales_channels:
        squares = sum(width**2 for width in context.layer_inputs)
        seconds += tokens * context.layers_seconds + machine.product * context.layers * tokens * squares / 2
        seconds += GRID * (machine.product32 * context.products + TRIED_SCALE * machine.number * context.linears)
    return seconds


def _smooth(step: Quantize, context: Context) -> bool:
    return step.smooth is True or (step.smooth == "auto" and not context.living)


def _mixing(step: Quantize, context: Context, calibrating: float, rounding: float) -> float:
    """Seconds until layers are chosen; `calibrating` is for a window, `rounding` for the model. Eight bits everywhere
    are enough where inputs are smoothed: no layer is measured then."""
    tried = TRIED * context.recipe.calibration.tokens * context.token_seconds
    if step.scheme == "w8a8" and not step.bits and _smooth(step, context):
        return 2 * tried
    levels = 1 if step.scheme == "w8a8" else 2
    seen = context.base.parameters / 2 + context.outside_layers  # from a layer in the middle on, as a rule
    sensitivity = levels * 4 * context.layers * PROBED * context.token_seconds * seen / context.base.parameters
    mixes = 0 if step.bits else MIXES
    return sensitivity + 2 * tried + mixes * (rounding + TRIED * calibrating + tried)


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
    context.refuse_too_little(context.recipe.calibration, "calibration")
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
    methods()[step.method].refuse(step, context)


def _refuse_rescaling(context: Context) -> None:
    """Adapters that scaled channels cannot be folded into."""
    for name in sorted(context.living & set(context.adapters)):
        if beyond_low_rank(context.adapters[name]):
            raise Refused(
                f"smoothing and AWQ scale channels, and the adapter {name!r} is more than a low-rank update (DoRA or "
                "modules_to_save), which does not follow them: say `smooth: false` and another method"
            )


def chosen(options: Mapping[str, Any]) -> list[str]:
    """The modules of its method."""
    method = methods()[options["method"]]
    return [part.__module__ for part in (method.round, method.scales) if part is not None]


STEP = StepKind(Quantize, "optimize.steps.quantize.quantize", estimate, refuse, chosen=chosen)
