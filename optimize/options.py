"""What each part of a recipe takes, and what all steps have; nothing here needs torch.

A step's own options are beside it (`steps/*/*rules.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One step's options, and what they mean to the steps beside it. Its tag is its name in a recipe."""

    reads_text: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ()  # options that name a file; its contents count, not its place
    quantizes: ClassVar[bool] = False
    trains: ClassVar[bool] = False  # an adapter, on held-out examples of its own
    after_quantizing: ClassVar[str] = (
        "the model is quantized by then, and changing it would mean to quantize again; put the step before"
    )
    retired: ClassVar[Mapping[str, str]] = {}  # options that are read still and do nothing: why

    @classmethod
    def name_in_recipes(cls) -> str:
        return str(cls.__struct_config__.tag)

    @property
    def kind(self) -> str:
        return self.name_in_recipes()

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapters that later steps need not look after: they are in the model, or in another adapter."""
        return ()

    @property
    def makes(self) -> str:
        """The name of the adapter that it makes; without one it changes the model."""
        return ""

    @property
    def measures(self) -> tuple[str, ...]:
        """Scores that it measures itself."""
        return ()

    @property
    def rounds_inputs(self) -> bool:
        """Whether the layers' inputs are rounded too, beside the weights."""
        return False

    @property
    def retired_sentences(self) -> list[str]:
        """What it says in vain."""
        fields = {field.name: field.default for field in msgspec.structs.fields(type(self))}
        return [why for name, why in self.retired.items() if getattr(self, name) != fields[name]]

    def check(self, where: str) -> None:
        """RecipeError when an option is out of its bounds, or does not go with another."""

    def check_order(self, where: str, before: Sequence[Step], later: Sequence[Step]) -> None:
        """RecipeError when it cannot come after those before it, or wants one after it."""
        if not self.makes and any(step.quantizes for step in before):
            raise RecipeError(f"{where}: {self.after_quantizing}")


def check_name(name: str, where: str) -> None:
    """RecipeError when it cannot be the name of a new adapter."""
    if not name or "/" in name or name.startswith("."):
        raise RecipeError(f"{where}: the new adapter needs a plain name of its own, not {name!r}")


class Evaluate(Part, frozen=True, kw_only=True):
    """What the result is measured on, and by `adapter_texts` what an adapter still does, each on its own text. `tasks`
    are lm-eval's, or files of its kind, of `task_limit` questions each."""

    text: str = "default"
    column: str = "text"
    samples: int = 32
    tokens: int = 512
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Name three fruits.",
        "Write one sentence about the sea.",
    )
    adapter_texts: Mapping[str, str] = {}
    engine: bool = True
    tasks: tuple[str, ...] = ()
    task_limit: int = 0


class Gate(Part, frozen=True, kw_only=True):
    """Bounds on what was measured; a bound that is not given is not held against the result, but for
    `max_engine_difference`, which is then 0.05, and `max_size`, which is then 1 where weights were rounded."""

    max_kl: float | None = None
    max_perplexity_increase: float | None = None
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
    """`exporter` writes the graph of `format: onnx`; optimum's runs in an environment of its own.

    Precisions from `bf16` on are those of `format: gguf`, whose matrices `method: gptq` rounds by the calibration text.
    """

    format: Literal["vllm", "onnx", "genai", "gguf", "adapter"] = "vllm"
    precision: Literal["fp32", "fp16", "int8", "int4", "bf16", "q8_0", "q6_k", "q4_0", "q4_k_m"] = "fp32"
    method: Literal["nearest", "gptq"] = "nearest"
    exporter: Literal["transformers", "optimum"] = "transformers"
    shard_bytes: int = 4_000_000_000

    @property
    def rounds(self) -> bool:
        """Whether the format's weights have fewer bits than 16."""
        return self.format in ("onnx", "genai", "gguf") and self.precision not in ("fp32", "fp16", "bf16")

    @property
    def calibrates(self) -> bool:
        return self.method != "nearest"


def plain(part: Part) -> dict[str, Any]:
    """A part as JSON's own types."""
    made: dict[str, Any] = msgspec.to_builtins(part)
    made.pop("type", None)
    return made
