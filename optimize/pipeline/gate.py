"""Compare what was measured with the bounds that the recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from optimize.options import Gate

# bound -> (score, its meaning)
BOUNDS: Mapping[str, tuple[str, str]] = {
    "max_perplexity_increase": ("perplexity_increase", "perplexity above or below the original's"),
    "max_kl": ("kl", "KL divergence from the original, nats a token"),
    "min_top1": ("top1", "tokens on which the likeliest is the original's"),
    "max_size": ("size_ratio", "weights' bytes against the original's"),
    "max_adapter_kl": ("worst_adapter_kl", "KL of an adapter on the new base from it on the old"),
    "min_adapter_effect": ("worst_adapter_effect", "cosine of an adapter's effect on the new base and on the old"),
    "min_speed": ("speed_1", "tokens/s at 1 stream against the original"),
    "min_speed_16": ("speed_16", "tokens/s at 16 streams against the original"),
    "min_healed": ("healed", "share of the log-perplexity lost by pruning that healing brought back"),
    "max_task_loss": ("task_loss", "the most that a task's score fell"),
    "max_valid_loss": ("valid_loss", "held-out loss of the trained adapter, nats"),
    "max_logit_difference": ("logit_difference", "largest difference of a logit from PyTorch's"),
    "max_merge_kl": ("merge_kl", "KL divergence of the merged model from base + adapters, nats a token"),
    "max_combine_error": ("combine_error", "error of a combined adapter against the exact sum, relative"),
    "max_engine_difference": (
        "engine_difference", "log-perplexity of the result in vLLM against the same in PyTorch",
    ),
}  # fmt: skip
# What PyTorch's emulation is judged by, the engine that serves the result is judged by too.
IN_ENGINE: Mapping[str, str] = {
    "max_perplexity_increase": "engine_perplexity_increase",
    "min_top1": "engine_top1",
}
ENGINE_DIFFERENCE = 0.05  # held where the recipe gives no bound: beyond it the two compute different models
# Held on both sides: what answers far better than the original on this text answers something else than the original.
TWO_SIDED = {"max_perplexity_increase"}
TIMED = {"min_speed", "min_speed_16"}
ADAPTED = {"max_adapter_kl", "min_adapter_effect"}  # nothing to hold where no adapter is left to work on the result


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound."""

    bound: str
    limit: float
    measured: float | None
    meaning: str

    @property
    def holds(self) -> bool:
        if self.measured is None:
            return False
        if self.bound in TWO_SIDED:
            return abs(self.measured) <= self.limit
        return self.measured <= self.limit if self.bound.startswith("max_") else self.measured >= self.limit

    @property
    def sentence(self) -> str:
        way = "at most" if self.bound.startswith("max_") else "at least"
        if self.bound in TWO_SIDED:
            way = "within"
        measured = "was not measured" if self.measured is None else f"is {self.measured:.4g}"
        return f"{self.meaning} {measured}, to be {way} {self.limit:g}"

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def judge(gate: Gate, scores: Mapping[str, Any], adapted: bool = True) -> list[Verdict]:
    """Every bound that the recipe gives; those of adapters only if there are some. NaN holds no bound."""
    verdicts = []
    bounds = msgspec.to_builtins(gate)
    if bounds["max_engine_difference"] is None and "engine_difference" in scores:
        bounds["max_engine_difference"] = ENGINE_DIFFERENCE
    for bound, limit in bounds.items():
        if limit is not None and (adapted or bound not in ADAPTED):
            score, meaning = BOUNDS[bound]
            verdicts.append(Verdict(bound, float(limit), scores.get(score), meaning))
            if IN_ENGINE.get(bound) in scores:
                verdicts.append(Verdict(bound, float(limit), scores[IN_ENGINE[bound]], f"{meaning}, in vLLM"))
    return verdicts


def judges(gate: Gate) -> bool:
    """Whether the recipe holds anything against the result."""
    return any(limit is not None for limit in msgspec.to_builtins(gate).values())
