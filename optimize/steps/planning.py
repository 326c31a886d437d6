"""What a step is judged by before any work: the recipe and the headers of its model and adapters, without torch.

Beside each step its rules have `estimate(step, context)`, what it needs, and `refuse(step, context)`, which raises
Refused. `pipeline.probe` measures what this machine takes for a layer and for a matrix, from which times follow.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize import processor
from optimize.checkpoint.checkpoint import ADAPTER, Checkpoint, header
from optimize.checkpoint.linears import input_widths, linear
from optimize.data import text
from optimize.errors import OptimizeError, Refused
from optimize.options import Evaluate, Text
from optimize.recipe import Recipe

MOVED = 128  # tokens whose logits are compared before channels are scaled and after
GRID = 20  # tries of AWQ
LOADED = 4  # passes over weights that are copied when a model is opened
# Bytes a second of files: of those that are written, and of those that are read, most of which the steps before have
# left in memory.
WRITTEN, READ = 1e9, 2e9
BATCH = 4  # windows that go through a layer at a time
# Bytes of a step before it has done anything, and seconds until it begins: for steps of other packages.
PROCESS, STARTING = 300_000_000, 0.5
IN_LAYER = re.compile(r"layers\.(\d+)\.")
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def weight_bytes() -> int:
    """Of a weight that is computed with."""
    return 2 if processor.multiplies_bfloat16() else 4


def writing(size: int) -> float:
    """Seconds in which a checkpoint of so many bytes is written: its tensors as they come, then the file of them."""
    return 2 * size / WRITTEN


def by_layer(size: int, memory: int) -> bool:
    """Whether models are read a layer at a time: two of `size` bytes do not fit into a bounded memory."""
    return bool(memory) and 2 * size > memory


def texts_of(part: Text | Evaluate, held_out: bool) -> list[Any]:
    """The texts of a recipe's section; none where the embedded ones cannot be fetched, which the run says."""
    try:
        return text.documents(part, held_out)
    except Refused:
        raise
    except OptimizeError:
        return []


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
class Machine:
    """Seconds and bytes that things take here, as `pipeline.probe` measures them with the model at hand; the numbers
    below are of two cores of a server, for where nothing was measured."""

    process: int = PROCESS
    opening: float = 0.2  # the model's modules
    calibration_text: float = 1.5  # all of it, in tokens
    evaluation_text: float = 0.8
    layer: float = 0.0  # a layer, for each token of a window; 0 goes by the layer's weights
    answering: float = 0.001  # a layer, for the next token of some answers
    learning: float = 0.0  # a layer there and back, for each token that an adapter learns from; 0 goes by `layer`
    updating: float = 0.01  # the same for an optimizer's step, however few its tokens are
    tracing: float = 0.15  # a graph of one layer
    head: float = 5e-12  # a multiplication of the output layer over a window
    reading: float = 3e-10  # a weight of the output layer for the next token
    product: float = 8e-12  # a multiplication of a Hessian
    product32: float = 1e-11  # one in float32
    scale: float = 2.5e-8  # a weight whose 4-bit scale is searched
    round: float = 4.5e-8  # a weight that GPTQ rounds
    zero: float = 3e-8  # a weight of a matrix in which a step makes zeros
    merging: float = 4e-8  # a weight that is merged into, and compared with PEFT's
    number: float = 8e-10  # a number of a softmax
    rounded_input: float = 5e-9  # a number of a linear layer's input that is rounded to 8 bits
    onnx_rounding: float = 1e-8  # a weight that is rounded for an ONNX graph, and put into it
    onnx_opening: float = 4e-9  # a weight of an ONNX graph
    onnx_reading: float = 5e-11  # a multiplication of it over a window
    onnx_answering: float = 1e-10  # and for the next token
    note: str = ""  # why a time is not the model's own


@dataclass(frozen=True, slots=True)
class Context:
    """A recipe, its model, the config of each of its adapters, the memory that there is, and the machine."""

    recipe: Recipe
    base: Checkpoint
    adapters: Mapping[str, Mapping[str, Any]]
    memory: int = 0  # that a step may have; 0 without a bound
    machine: Machine = Machine()

    def refuse_too_little(self, part: Text | Evaluate, where: str) -> None:
        """Refused, where a section's text gives fewer windows than it asks for."""
        texts = texts_of(part, held_out=isinstance(part, Evaluate))
        if texts and sum(len(str(each)) for each in texts) < text.LONG_TOKEN * part.samples * part.tokens:
            from optimize.checkpoint.model import tokenizer

            try:
                text.windows(tokenizer(self.base.folder), texts, part.samples, part.tokens, self.recipe.seed)
            except Refused as error:
                raise Refused(f"{where}: {error.message}") from error

    @property
    def living(self) -> set[str]:
        """The recipe's adapters that no step consumes."""
        return set(self.recipe.adapters) - {name for step in self.recipe.steps for name in step.consumed}

    @property
    def calibration_tokens(self) -> int:
        return self.recipe.calibration.samples * self.recipe.calibration.tokens

    @property
    def layers_seconds(self) -> float:
        """All layers, for each token."""
        return self.layers * (self.machine.layer or 1e-11 * self.largest_layer)

    @property
    def token_seconds(self) -> float:
        """A forward pass, for each token."""
        return self.layers_seconds + self.machine.head * self.vocabulary * self.hidden

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
    def copied_by_layer(self) -> int:
        """The same where the layers are there one after another."""
        return min(self.copied, 4 * (self.outside_layers + self.largest_layer))

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
    def linears(self) -> int:
        """Parameters of every linear layer in the decoder's layers."""
        return sum(math.prod(shape) for name, shape in self.base.shapes.items() if linear(name, shape))

    @property
    def products(self) -> int:
        """Multiplications of every linear layer in the decoder's layers with a matrix as wide as its input is."""
        return sum(math.prod(shape) * shape[1] for name, shape in self.base.shapes.items() if linear(name, shape))

    @property
    def inputs(self) -> int:
        """Numbers that every linear layer in the decoder's layers reads for a token."""
        return sum(shape[1] for name, shape in self.base.shapes.items() if linear(name, shape))

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


def summing(context: Context) -> tuple[float, int]:
    """Seconds and bytes of a Hessian for each input of a layer; the text goes through each layer for them."""
    widths = context.layer_inputs
    summed = context.layers * context.calibration_tokens * sum(width**2 for width in widths) / 2
    seconds = context.calibration_tokens * context.layers_seconds + context.machine.product * summed
    return seconds, 4 * sum(width**2 for width in widths)


def cubes(context: Context) -> int:
    """Multiplications of every Hessian with a matrix of its size."""
    return context.layers * sum(width**3 for width in context.layer_inputs)


def calibrating(context: Context) -> tuple[float, int]:
    """The same with its factor, and a sum over columns for each column."""
    seconds, size = summing(context)
    machine = context.machine
    seconds += machine.product32 * (cubes(context) / 3 + context.products / 2) + machine.round * context.linears
    return seconds, size + max(0, 8 * context.widest**2 - 8 * context.largest_unit)


def following(context: Context) -> tuple[float, int]:
    """The same where the original's text goes through each layer too, with a sum of products with it for each input."""
    seconds, size = calibrating(context)
    machine, squares = context.machine, sum(width**2 for width in context.layer_inputs)
    tokens = context.calibration_tokens
    seconds += tokens * context.layers_seconds + machine.product * context.layers * tokens * squares
    seconds += machine.product32 * context.products
    batch = min(tokens, BATCH * context.recipe.calibration.tokens)
    return seconds, size + 4 * squares + 4 * tokens * context.hidden + 8 * batch * sum(context.layer_inputs)


def passing(context: Context) -> int:
    """Bytes of the hidden states before and after a layer, of what a batch is inside one, and of a layer that is
    changed, of which a matrix is in float32, turned around and its errors."""
    calibrated = context.calibration_tokens
    batch = min(calibrated, BATCH * context.recipe.calibration.tokens)
    states = 4 * calibrated * context.hidden + 12 * batch * context.widest
    return states + 2 * context.largest_layer + 16 * context.largest_unit


def beyond_low_rank(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is more than a low-rank update."""
    return bool(config.get("use_dora") or config.get("modules_to_save") or config.get("trainable_token_indices"))


def beside_products(context: Context, name: str) -> str:
    """What an adapter of the recipe has beside A and B of linear layers; empty where these are all."""
    config = context.adapters[name]
    if beyond_low_rank(config):
        return "is more than a low-rank update (DoRA or modules_to_save)"
    if config.get("lora_bias"):
        return "has biases beside its B matrices (lora_bias)"
    tensors = header(Path(context.recipe.adapters[name]) / ADAPTER)
    return "adapts the embedding" if any(".lora_embedding_" in tensor for tensor in tensors) else ""
