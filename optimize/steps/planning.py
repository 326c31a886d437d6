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

from optimize import processor
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.linears import input_widths, linear
from optimize.recipe import Recipe

IN_LAYER = re.compile(r"layers\.(\d+)\.")
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
FLOPS = 2e11  # of a forward pass in bf16, two cores
FLOPS32 = 1.5e11  # of a product in fp32, two cores
STARTING = 8.0  # seconds until a child has imported torch and transformers
PROCESS = 700_000_000  # bytes of a child that has imported them


def weight_bytes() -> int:
    """Of a weight that is computed with."""
    return 2 if processor.multiplies_bfloat16() else 4


def by_layer(size: int, memory: int) -> bool:
    """Whether models are read a layer at a time: two of `size` bytes do not fit into a bounded memory."""
    return bool(memory) and 2 * size > memory


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
    """A recipe, its model, the config of each of its adapters, and the memory that there is."""

    recipe: Recipe
    base: Checkpoint
    adapters: Mapping[str, Mapping[str, Any]]
    memory: int = 0  # that a step may have; 0 without a bound

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
    def copied(self) -> int:
        """Bytes of a model's weights that no file backs: they are copied where the processor multiplies no bfloat16."""
        return 0 if processor.multiplies_bfloat16() else 4 * self.weights

    @property
    def weights(self) -> int:
        """Parameters of the model when none of them is rounded."""
        return sum(math.prod(shape) for shape in self.base.shapes.values())

    @property
    def largest_unit(self) -> int:
        """Parameters of the largest of the matrices that are rounded as one."""
        counts: Counter[tuple[str, str]] = Counter()
        for name, shape in self.base.shapes.items():
            if linear(name, shape) and (match := IN_LAYER.search(name)):
                leaf = name.removesuffix(".weight").rpartition(".")[2]
                counts[match[1], FUSED.get(leaf, leaf)] += math.prod(shape)
        return max(counts.values(), default=0)

    @property
    def products(self) -> int:
        """Multiplications of every linear layer in the decoder's layers with a matrix as wide as its input is."""
        return sum(math.prod(shape) * shape[1] for name, shape in self.base.shapes.items() if linear(name, shape))

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
    return bool(config.get("use_dora") or config.get("modules_to_save") or config.get("trainable_token_indices"))
