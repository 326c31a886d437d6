"""What `auto` becomes, known before any work and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 2048  # tokens of an example, unless max_length says more
CHECKPOINTED = 4_000_000_000  # bytes of activations above which they are computed again instead of kept
ROW = 512  # tokens that go through the model at once, unless one example is longer


FEWEST_EVALUATIONS = 4  # in one run, even of one epoch


@dataclass(frozen=True, slots=True)
class Settings:
    rank: int
    alpha: float
    learning_rate: float
    epochs: int
    batch: int
    max_length: int
    gradient_checkpointing: bool
    loraplus_ratio: float = 1.0


def evaluated_every(epoch: int, steps: int) -> int:
    """Steps between evaluations, of all `steps` of which an epoch has so many."""
    return max(1, min(epoch, steps // FEWEST_EVALUATIONS))


def max_length(options: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Tokens of an example that are read."""
    return int(options["max_length"]) or min(LONGEST, int(_of(config, "max_position_embeddings", LONGEST)))


def settled(
    options: Mapping[str, Any], config: Mapping[str, Any], adapter: Mapping[str, Any] | None, count: int, longest: int
) -> Settings:
    """The options of a tune step over a model with this `config`, from this `adapter` on, for `count` examples of which
    the longest has `longest` tokens."""
    rank = int(adapter["r"]) if adapter else int(options["rank"])
    alpha = float(adapter["lora_alpha"]) if adapter else float(options["alpha"] or 2 * rank)
    rate = options["learning_rate"]
    if rate == "auto":
        rate = _rate(int(_of(config, "hidden_size", 2048))) * (1 if options["method"] == "supervised" else 0.1)
    again = options["gradient_checkpointing"]
    if again == "auto":
        again = activations(config, max(ROW, longest)) > CHECKPOINTED
    return Settings(
        rank=rank,
        alpha=int(alpha) if alpha.is_integer() else alpha,
        learning_rate=float(f"{rate * options['learning_rate_multiplier']:.3g}"),
        epochs=_epochs(count) if options["epochs"] == "auto" else int(options["epochs"]),
        # Small: updates matter more than their noise while there are few examples.
        batch=max(1, min(8, count // 16)) if options["batch"] == "auto" else int(options["batch"]),
        max_length=max_length(options, config),
        gradient_checkpointing=bool(again),
        loraplus_ratio=float(options["loraplus_ratio"]),
    )


def activations(config: Mapping[str, Any], tokens: int) -> int:
    """Bytes that the layers keep of `tokens` for the way back."""
    hidden, inner = int(_of(config, "hidden_size", 1)), int(_of(config, "intermediate_size", 1))
    return int(_of(config, "num_hidden_layers", 1)) * tokens * (40 * hidden + 16 * inner)


def _rate(hidden: int) -> float:
    """Ten times what full fine-tuning takes, and less for wider models: "LoRA Without Regret", Schulman et al. 2025."""
    return min(2e-3, 5e-4 * (2000 / hidden) ** 0.781)


def _epochs(count: int) -> int:
    """Three, unless that is fewer than 100 examples or more than 25,000: OpenAI's rule."""
    if count * 3 < 100:
        return min(25, 100 // max(1, count))
    return max(1, min(3, 25_000 // count))


def _of(config: Mapping[str, Any], key: str, default: int) -> Any:
    """A key of a model's config, or of its text part."""
    return config.get(key) or (config.get("text_config") or {}).get(key) or default
