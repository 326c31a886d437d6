"""What each part of a recipe takes, and the bounds of each step; nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from optimize.errors import RecipeError

Part = msgspec.Struct


class Text(Part, frozen=True, kw_only=True):
    """Text for calibration or evaluation: `default`, a .jsonl, .txt or .parquet file, a folder of .jsonl, as a server
    captures, or files of a dataset on the hub: `hf://datasets/ORG/NAME/PATTERN`, with `@REVISION` behind the name."""

    text: str = "default"
    column: str = "text"
    samples: int = 32
    tokens: int = 512


class Step(Part, frozen=True, kw_only=True):
    """One step's options, and what they mean to the steps beside it."""

    reads_text: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ()  # options that name a file; its contents count, not its place

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapters that later steps need not look after: they are in the model, or in another adapter."""
        return ()

    def check(self, where: str) -> None:
        """RecipeError when an option is out of its bounds, or does not go with another."""


class Merge(Step, frozen=True, kw_only=True, tag="merge"):
    """LoRA adapters into the base's weights, one after another; into a quantized base only with `requantize`."""

    reads_text: ClassVar[bool] = False
    adapters: tuple[str, ...]
    weights: tuple[float, ...] = ()
    requantize: bool = False

    @property
    def consumed(self) -> tuple[str, ...]:
        return self.adapters

    def check(self, where: str) -> None:
        _weighted(self, where)


class Combine(Step, frozen=True, kw_only=True, tag="combine"):
    """Several adapters into one adapter called `name`."""

    reads_text: ClassVar[bool] = False
    name: str
    adapters: tuple[str, ...]
    method: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "svd"
    weights: tuple[float, ...] = ()
    rank: int = 0
    density: float = 0.5

    @property
    def consumed(self) -> tuple[str, ...]:
        return self.adapters

    def check(self, where: str) -> None:
        _weighted(self, where)
        if not 0 < self.density <= 1:
            raise RecipeError(f"{where}: density is above 0 and at most 1, not {self.density}")
        _plainly_named(self, where)


def _plainly_named(step: Combine | Tune, where: str) -> None:
    if not step.name or "/" in step.name or step.name.startswith("."):
        raise RecipeError(f"{where}: the new adapter needs a plain name of its own, not {step.name!r}")


def _weighted(step: Merge | Combine, where: str) -> None:
    if not step.adapters:
        raise RecipeError(f"{where}: name at least one adapter")
    if step.weights and len(step.weights) != len(step.adapters):
        raise RecipeError(f"{where}: {len(step.weights)} weights for {len(step.adapters)} adapters")


class Prune(Step, frozen=True, kw_only=True, tag="prune"):
    """Whole layers (`greedy`: those that calibration text misses least), a share of the MLP's width by activation,
    zeros, or a smaller vocabulary.

    `sparsity` is a share of zeros, `pattern` is N:M (2:4 keeps two of four); `vocabulary` is how many tokens stay, or
    `used` for those of the calibration text.
    """

    layers: int = 0
    choose: Literal["greedy", "influence"] = "greedy"
    mlp: float = 1.0
    sparsity: float = 0.0
    pattern: str = ""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    vocabulary: int | Literal["used"] = 0

    @property
    def zeros(self) -> bool:
        return bool(self.sparsity or self.pattern)

    def check(self, where: str) -> None:
        wishes = [bool(self.layers) or self.mlp != 1.0, self.zeros, bool(self.vocabulary)]
        if sum(wishes) == 0:
            raise RecipeError(
                f"{where}: say `layers: N` to drop layers, `mlp: 0.875` to narrow the MLP, `vocabulary: N` to trim it, "
                "or `sparsity: 0.5` or `pattern: 2:4` for zeros"
            )
        if sum(wishes) > 1:
            raise RecipeError(
                f"{where}: structure, zeros and vocabulary are three steps; give each a `- prune:` of its own"
            )
        if self.layers < 0 or not 0 < self.mlp <= 1:
            raise RecipeError(f"{where}: layers is a count and mlp a share above 0 and at most 1")
        if self.vocabulary != "used" and self.vocabulary < 0:
            raise RecipeError(f"{where}: vocabulary is how many tokens stay, or `used`")
        if self.zeros:
            self._check_zeros(where)

    def _check_zeros(self, where: str) -> None:
        if self.sparsity and self.pattern:
            raise RecipeError(f"{where}: `sparsity` or `pattern`, not both; 2:4 is half of the weights")
        if not self.pattern and not 0 < self.sparsity < 1:
            raise RecipeError(f"{where}: sparsity is a share above 0 and below 1, not {self.sparsity}")
        if self.pattern and not re.fullmatch(r"[1-9]\d?:(4|8|16|32)", self.pattern):
            raise RecipeError(f"{where}: a pattern is N:M with M of 4, 8, 16 or 32, such as 2:4, not {self.pattern!r}")
        pattern = pattern_of(self.pattern)
        if pattern and pattern[0] >= pattern[1]:
            raise RecipeError(f"{where}: {self.pattern} leaves no zeros; 2:4 keeps two of four")


class Heal(Step, frozen=True, kw_only=True, tag="heal"):
    """Put back what a linear map can (`repair`), then distil the original into the pruned model through a LoRA that is
    merged."""

    repair: bool = True
    steps: int = 200
    rank: int = 32
    learning_rate: float = 1e-3
    batch: int = 4
    tokens: int = 256
    samples: int = 0

    def check(self, where: str) -> None:
        if min(self.rank, self.batch, self.tokens) < 1 or self.learning_rate <= 0:
            raise RecipeError(f"{where}: rank, batch, tokens and learning_rate are above 0")
        if self.steps < 0 or not (self.steps or self.repair):
            raise RecipeError(f"{where}: steps is above 0, or 0 with `repair: true`")


class Quantize(Step, frozen=True, kw_only=True, tag="quantize"):
    """Fewer bits. With mixed precision sensitive layers keep more: `budget` is what perplexity may rise by, `agreement`
    the least share of tokens that stay the likeliest.

    `bits` is how many a weight may take on average, scales included, instead of a bound on what is lost. `awq-gptq` is
    GPTQ with AWQ's scales of channels; `refit` is GPTQ's at 4 bits: integers and scales are chosen again after it.
    `format` gptq is for w4a16, and onnxruntime-genai's builder takes it too; `ignore` holds names of layers, their last
    words, or `re:` patterns.
    """

    scheme: Literal["w8a8", "w8a16", "w4a16", "fp8", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"] = "w8a8"
    method: Literal["gptq", "awq", "awq-gptq", "rtn"] = "gptq"
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
    def mixed(self) -> bool:
        return bool(self.budget or self.agreement or self.bits)

    @property
    def scales_channels(self) -> bool:
        """Whether AWQ's scales are folded into what makes a layer's input."""
        return self.method in ("awq", "awq-gptq")

    def check(self, where: str) -> None:
        if self.scheme != "w4a16" and (self.scales_channels or self.format == "gptq"):
            raise RecipeError(f"{where}: AWQ and the format gptq go with w4a16, not {self.scheme}")
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


class Tune(Step, frozen=True, kw_only=True, tag="tune"):
    """A LoRA adapter called `name`, trained on the examples in `train`: by their answers (`supervised`), by which of
    two answers is better (`dpo`), or by which answers are good (`kto`). `adapter` is one to go on from, with its rank,
    alpha and targets.

    With `validation` the adapter of the least held-out loss is kept, and `patience` evaluations without a better one
    end the training. `alpha` 0 is twice the rank; `max_length` 0 is the model's, up to 2,048 tokens; `threads` 0 is
    every core.
    """

    reads_text: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ("train", "validation")
    train: str
    validation: str = ""
    name: str = "adapter"
    adapter: str = ""
    method: Literal["supervised", "dpo", "kto"] = "supervised"
    rank: int = 16
    alpha: float = 0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    learning_rate: float | Literal["auto"] = "auto"
    learning_rate_multiplier: float = 1.0
    epochs: int | Literal["auto"] = "auto"
    batch: int | Literal["auto"] = "auto"
    max_length: int = 0
    beta: float = 0.1
    patience: int = 3
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int = 0

    @property
    def consumed(self) -> tuple[str, ...]:
        return (self.adapter,) if self.adapter else ()

    def check(self, where: str) -> None:
        _plainly_named(self, where)
        if not self.train:
            raise RecipeError(f"{where}: train names a .jsonl file of examples")
        if self.train == self.validation:
            raise RecipeError(f"{where}: train and validation are the same file; hold out examples of their own")
        for key in ("rank", "batch", "epochs", "learning_rate", "learning_rate_multiplier", "beta"):
            value = getattr(self, key)
            if value != "auto" and not 0 < value < float("inf"):
                raise RecipeError(f"{where}: {key} is above 0, not {value:g}")
        for key in ("alpha", "max_length", "patience", "threads"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise RecipeError(f"{where}: {key} is at least 0, not {getattr(self, key):g}")
        if not self.targets:
            raise RecipeError(f"{where}: targets is all-linear, or names modules such as [q_proj, v_proj]")


class Evaluate(Part, frozen=True, kw_only=True):
    """What the result is measured on. `tasks` are lm-eval's, or files of its kind, of `task_limit` questions each."""

    text: str = "default"
    column: str = "text"
    samples: int = 32
    tokens: int = 512
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Name three fruits.",
        "Write one sentence about the sea.",
    )
    engine: bool = True
    tasks: tuple[str, ...] = ()
    task_limit: int = 0


class Gate(Part, frozen=True, kw_only=True):
    """Bounds on what was measured; a bound that is not given is not held against the result, but for
    `max_engine_difference`, which is then 0.05."""

    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_size: float | None = None
    max_adapter_kl: float | None = None
    min_adapter_effect: float | None = None
    min_speed: float | None = None
    min_speed_16: float | None = None
    min_healed: float | None = None
    max_task_loss: float | None = None
    max_logit_difference: float | None = None
    max_valid_loss: float | None = None
    max_merge_kl: float | None = None
    max_combine_error: float | None = None
    max_engine_difference: float | None = None


class Export(Part, frozen=True, kw_only=True):
    """`exporter` writes the graph of `format: onnx`; optimum's runs in an environment of its own."""

    format: Literal["vllm", "onnx", "genai", "adapter"] = "vllm"
    precision: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    exporter: Literal["transformers", "optimum"] = "transformers"
    shard_bytes: int = 4_000_000_000


STEPS: Mapping[str, type[Step]] = {
    "merge": Merge,
    "combine": Combine,
    "prune": Prune,
    "heal": Heal,
    "quantize": Quantize,
    "tune": Tune,
}
KIND = {made: kind for kind, made in STEPS.items()}


def plain(part: Part) -> dict[str, Any]:
    """A part as JSON's own types."""
    made: dict[str, Any] = msgspec.to_builtins(part)
    made.pop("type", None)
    return made


def pattern_of(pattern: str) -> tuple[int, int] | None:
    """(2, 4) from "2:4": two of four stay."""
    kept, colon, of = pattern.partition(":")
    return (int(kept), int(of)) if colon else None
