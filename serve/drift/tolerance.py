"""Which effects are too small to matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Effects that are too small to matter. A share q of foreign requests shifts a rank by q / 2 at most."""

    rank_shift: float = 0.1
    foreign_share: float = 0.03  # of the requests, at least; of prompts and outputs
    logprob: float = 0.15  # nat, of the mean logprob that prompt and length do not explain
    refusal: float = 0.02  # of all answers
    probe: float = 1.5  # times the probe's noise

    def beyond(self, effects: Mapping[str, float]) -> dict[str, float]:
        """Those of the effects that are above; signed, where a sign means something."""
        sizes = {name: value if name == "refusal" else abs(value) for name, value in effects.items()}
        return {name: effects[name] for name, size in sizes.items() if size > getattr(self, name)}
