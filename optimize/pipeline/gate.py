"""Compare what was measured with the bounds that the recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from optimize.options import Gate

# bound -> (score, its meaning)
BOUNDS: Mapping[str, tuple[str, str]] = {
    "max_kl": ("kl", "KL divergence from the original, nats a token"),
    "max_perplexity_increase": ("perplexity_increase", "perplexity above or below the original's"),
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
# Held where the recipe gives no bound.
ENGINE_DIFFERENCE = 0.05  # beyond it the two compute different models
SIZE = 1.0  # of weights in fewer bits: beyond it nothing was gained
# Held on both sides: what answers far better than the original on this text answers something else than the original.
TWO_SIDED = {"max_perplexity_increase"}
TIMED = {"min_speed", "min_speed_16"}
ADAPTED = {"max_adapter_kl", "min_adapter_effect"}  # nothing to hold where no adapter is left to work on the result


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound. `low` and `high` are where the score lies for all windows like those that were measured: all of that
    has to be within the bound."""

    bound: str
    limit: float
    measured: float | None
    meaning: str
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        if self.measured is None:
            return False
        return all(map(self._within, self._ends))

    @property
    def undecided(self) -> bool:
        """Some of where it lies is within the bound, and some is not."""
        return not self.holds and self.measured is not None and any(map(self._within, self._ends))

    @property
    def _ends(self) -> tuple[float, ...]:
        return tuple(end for end in (self.measured, self.low, self.high) if end is not None)

    def _within(self, score: float) -> bool:
        if self.bound in TWO_SIDED:
            return abs(score) <= self.limit
        return score <= self.limit if self.bound.startswith("max_") else score >= self.limit

    @property
    def sentence(self) -> str:
        way = "at most" if self.bound.startswith("max_") else "at least"
        if self.bound in TWO_SIDED:
            way = "within"
        measured = "was not measured" if self.measured is None else f"is {self.measured:.4g}"
        if self.low is not None and self.high is not None:
            measured += f" ({self.low:.4g} to {self.high:.4g})"
        undecided = ", which so few windows leave undecided: raise evaluate.samples" if self.undecided else ""
        return f"{self.meaning} {measured}, to be {way} {self.limit:g}{undecided}"

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def judge(gate: Gate, scores: Mapping[str, Any], adapted: bool = True, rounded: bool = False) -> list[Verdict]:
    """Every bound that the recipe gives; those of adapters only if there are some. NaN holds no bound. `rounded` says
    that weights have fewer bits by now."""
    verdicts = []
    bounds = msgspec.to_builtins(gate)
    if bounds["max_engine_difference"] is None and "engine_difference" in scores:
        bounds["max_engine_difference"] = ENGINE_DIFFERENCE
    if bounds["max_size"] is None and rounded and "size_ratio" in scores:
        bounds["max_size"] = SIZE
    for bound, limit in bounds.items():
        if limit is not None and (adapted or bound not in ADAPTED):
            score, meaning = BOUNDS[bound]
            low, high = scores.get("intervals", {}).get(score, (None, None))
            verdicts.append(Verdict(bound, float(limit), scores.get(score), meaning, low, high))
            if IN_ENGINE.get(bound) in scores:
                verdicts.append(Verdict(bound, float(limit), scores[IN_ENGINE[bound]], f"{meaning}, in vLLM"))
    return verdicts


def judges(gate: Gate) -> bool:
    """Whether the recipe holds anything against the result."""
    return any(limit is not None for limit in msgspec.to_builtins(gate).values())
