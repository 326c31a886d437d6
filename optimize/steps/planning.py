"""What a step is judged by before any work: the recipe and the headers of its model and adapters, without torch.

Beside each step its rules have `estimate(step, context)`, what it needs, and `refuse(step, context)`, which raises
Refused. Times were measured on two cores of a server CPU and scale with parameters and tokens; they are right within a
factor of two there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.linears import input_widths
from optimize.recipe import Recipe

IN_LAYER = re.compile(r"layers\.(\d+)\.")
FLOPS = 2e11  # of a forward pass in bf16, two cores
STARTING = 8.0  # seconds until a child has imported torch and transformers
PROCESS = 700_000_000  # bytes of a child that has imported them


@dataclass(frozen=True, slots=True)
class Estimate:
    """One line of the plan: bytes of memory and of disk."""

    kind: str
    what: str
    memory: int
    disk: int
    seconds: float
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """A recipe, its model, and the config of each of its adapters."""

    recipe: Recipe
    base: Checkpoint
    adapters: Mapping[str, Mapping[str, Any]]

    @property
    def living(self) -> set[str]:
        """The recipe's adapters that no step consumes."""
        return set(self.recipe.adapters) - {name for step in self.recipe.steps for name in step.consumed}

    @property
    def calibration_tokens(self) -> int:
        return self.recipe.calibration.samples * self.recipe.calibration.tokens

    @property
    def token_seconds(self) -> float:
        """A forward pass, for each token."""
        return 2 * self.base.parameters / FLOPS

    @property
    def layers(self) -> int:
        return int(self.base.config.get("num_hidden_layers") or self.base.config.get("n_layer") or 1)

    @property
    def hidden(self) -> int:
        return int(self.base.config.get("hidden_size") or self.base.config.get("n_embd") or 1)

    @property
    def vocabulary(self) -> int:
        return int(self.base.config.get("vocab_size") or 1)

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest of the decoder's layers."""
        counts: Counter[str] = Counter()
        for name, shape in self.base.shapes.items():
            if match := IN_LAYER.search(name):
                counts[match[1]] += math.prod(shape)
        return max(counts.values(), default=0)

    @property
    def outside_layers(self) -> int:
        """Parameters of embedding, last norm and output layer."""
        return sum(math.prod(shape) for name, shape in self.base.shapes.items() if not IN_LAYER.search(name))

    @property
    def layer_inputs(self) -> tuple[int, ...]:
        """The widths of what is read in a layer: by q, k and v, by o, by gate and up, by down."""
        return (self.hidden, self.hidden, self.hidden, self.widest)

    @property
    def widest(self) -> int:
        """The largest input width of a linear layer."""
        return max(input_widths(self.base), default=self.hidden)


def beyond_low_rank(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is more than a low-rank update."""
    return bool(config.get("use_dora") or config.get("modules_to_save"))
