"""A model opened layer by layer beside the text that it is calibrated on, for every step that looks at layer inputs.

The weights are mapped, so memory holds one layer, the hidden states of the calibration text, and one Hessian. Linear
layers come in the engine's fused units: q, k and v are one matrix there, gate and up another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import log_softmax

from optimize.checkpoint import architectures
from optimize.checkpoint.architectures import Feed
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.linears import ignored
from optimize.checkpoint.model import (
    Entered,
    answered,
    compute_dtype,
    entered,
    layers,
    opened,
    prefix,
    through,
    tokenizer,
)
from optimize.data import text
from optimize.errors import Refused
from optimize.job import Job
from optimize.steps.planning import BATCH

PRODUCTS = 1024  # columns of a Hessian that are added to at a time
K = TypeVar("K", bound=Hashable)

# Linear layers that the engine fuses, so that they share a level; in the order in which a layer uses them.
UNITS = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Linear layers with one input and one level, by their full names."""

    layer: int
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.layer}.{'/'.join(name.rpartition('.')[2].removesuffix('_proj') for name in self.names)}"


def windows(job: Job) -> list[list[int]]:
    """The calibration text in the model's tokens."""
    part = job.calibration
    return text.windows(tokenizer(Path(job.model)), text.documents(part, False), part.samples, part.tokens, job.seed)


class CalibratedModel:
    """One model, its calibration text, and its linear layers in units, but those that are ignored.

    With `by_layer`, weights that cannot be computed with as they are on the disk are there while a layer is `held`.
    """

    def __init__(
        self,
        folder: Path,
        ids: list[list[int]],
        ignore: frozenset[str] = frozenset(),
        dtype: torch.dtype | None = None,
        by_layer: bool = False,
    ) -> None:
        self.folder = folder
        self.dtype = dtype or compute_dtype()
        self.ids = torch.tensor(ids)
        checkpoint = Checkpoint(folder)
        self.config = checkpoint.config
        kinds = {entry.dtype for entry in checkpoint.entries.values()}
        self.by_layer = by_layer and self.dtype is torch.float32 and kinds != {"F32"}
        self.family = architectures.dense(self.config, "calibration")
        self.changed = True
        self.reopen()
        self.prefix = prefix(self.model)
        self.units = tuple(self._find_units(ignore))
        if not self.units:
            raise Refused(
                "the model has no q/k/v/o or gate/up/down projections; only Llama-like decoders are quantized"
            )

    def reopen(self) -> None:
        """The model as it is on disk again; what was changed is let go of before."""
        if not self.changed:
            return
        self.__dict__.pop("model", None)
        self.__dict__.pop("layers", None)
        self.model = opened(self.folder, self.dtype, by_layer=self.by_layer)
        self.layers = layers(self.model)
        self.changed = False

    def _find_units(self, ignore: frozenset[str]) -> Iterator[Unit]:
        for at, layer in enumerate(self.layers):
            linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            for family in UNITS:
                names = tuple(f"{self.prefix}.{at}.{name}" for name in linears if name.rpartition(".")[2] in family)
                names = tuple(name for name in names if not ignored(name, ignore))
                if names:
                    yield Unit(at, names)

    def feeds_of(self, layer: int) -> list[Feed]:
        """What reads what in a layer, by full names, but modules that this model does not have."""
        inside = f"{self.prefix}.{layer}"
        names = {name for name, _ in self.layers[layer].named_modules()}
        return [
            Feed(f"{inside}.{feed.producer}", tuple(f"{inside}.{name}" for name in feed.consumers), feed.half)
            for feed in architectures.feeds(self.config)
            if names >= {feed.producer, *feed.consumers}
        ]

    def scaled(self, factors: Collection[str]) -> set[str]:
        """The parameters that scaling these producers changes: theirs, and the weights of all that reads them."""
        names: set[str] = set()
        for layer in range(len(self.layers)):
            for feed in self.feeds_of(layer):
                if feed.producer in factors:
                    names |= {f"{feed.producer}.{part}" for part, _ in self.linear(feed.producer).named_parameters()}
                    names |= {f"{name}.weight" for name in feed.consumers}
        return names

    def units_of(self, layer: int) -> list[Unit]:
        return [unit for unit in self.units if unit.layer == layer]

    def elements(self, unit: Unit) -> int:
        return sum(self.linear(name).weight.numel() for name in unit.names)

    def linear(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def set_weight(self, name: str, weight: torch.Tensor, part: str = "weight") -> None:
        self.set_parameter(f"{name}.{part}", nn.Parameter(weight.to(self.dtype), requires_grad=False))

    def set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        module, _, part = name.rpartition(".")
        setattr(self.linear(module), part, parameter)
        self.changed = True

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def restore(self, layer: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """A layer as it was when these were the model's `parameters`; as it is on disk, it takes no memory."""
        for name, parameter in parameters.items():
            if name.startswith(f"{self.prefix}.{layer}."):
                self.set_parameter(name, parameter)

    def entered(self, windows: int = 0) -> Entered:
        """What the first layer is called with: for the last `windows` of the calibration text, or for all of it."""
        return entered(self.model, self.ids[-windows:], BATCH)

    @contextmanager
    def observed(
        self, readers: Mapping[K, str], more: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
    ) -> Iterator[dict[K, torch.Tensor]]:
        """`more(so far, input)` over all inputs of each of `readers`, linear layers by name, of the text that runs
        through the model meanwhile."""
        measured: dict[K, torch.Tensor] = {}

        def watch(key: K) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                measured[key] = more(measured.get(key), inputs[0].float())

            return hook

        hooks = [self.linear(name).register_forward_pre_hook(watch(key)) for key, name in readers.items()]
        try:
            yield measured
        finally:
            for hook in hooks:
                hook.remove()

    def hessians(self, layer: int, readers: Mapping[K, str], begun: Entered) -> dict[K, torch.Tensor]:
        """The sum of x xT over the inputs x of each of `readers`, (in, in)."""
        with products_of(self.dtype), self.observed(readers, _add_products) as sums:
            through([self.layers[layer]], begun)
        for total in sums.values():
            _mirror(total)
        return sums

    def products(
        self, layer: int, readers: Mapping[K, str], begun: Entered, whole: Entered
    ) -> tuple[dict[K, torch.Tensor], dict[K, torch.Tensor], Entered]:
        """`hessians`; the sum of (y - x) xT, (in, in), where y is each reader's input if `whole` enters the layer; and
        what the layer gives for that. An expert has no such sum: other tokens may reach it."""
        followed = {key: name for key, name in readers.items() if ".experts." not in name}
        sums: dict[K, torch.Tensor] = {}
        apart: dict[K, torch.Tensor] = {}
        after = []
        with products_of(self.dtype):
            for state, of_whole, calls in zip(begun.states, whole.states, begun.calls, strict=True):
                with self.observed(followed, lambda _, x: x) as meant:
                    after += through([self.layers[layer]], Entered([of_whole], [calls])).states
                with self.observed(readers, lambda _, x: x) as given:
                    through([self.layers[layer]], Entered([state], [calls]))
                for key, x in given.items():
                    sums[key] = _add_products(sums.get(key), x)
                    if (y := meant.pop(key, None)) is not None:
                        apart[key] = _add_apart(apart.get(key), y, x)
        for total in sums.values():
            _mirror(total)
        return sums, apart, Entered(after, begun.calls)

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """(windows, tokens, vocabulary) in float32, of the model as it is now."""
        rows = []
        for row in ids.split(1):
            with torch.inference_mode():
                rows.append(log_softmax(self.model(input_ids=row, use_cache=False).logits.float(), -1))
        return torch.cat(rows)

    @torch.inference_mode()
    def log_probabilities_from(self, layer: int, begun: Entered) -> Iterator[torch.Tensor]:
        """The same from what enters `layer` on, window after window."""
        for row in torch.cat(through(list(self.layers[layer:]), begun).states):
            yield log_softmax(answered(self.model, row[None])[0].float(), -1)


def largest(measured: torch.Tensor | None, magnitudes: torch.Tensor) -> torch.Tensor:
    """For `observed`: the largest so far of each."""
    return magnitudes if measured is None else torch.maximum(measured, magnitudes)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """float32 matrices whose numbers are bfloat16's are multiplied as such, where that is faster: no product loses a
    bit, and they are summed in float32 all the same."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype is torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_products(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The sum of x xT so far, below its diagonal and in blocks on it: it is symmetric."""
    rows = x.flatten(0, -2)
    width = rows.shape[1]
    total = torch.zeros(width, width) if total is None else total
    for start in range(0, width, PRODUCTS):
        end = start + PRODUCTS
        total[start:, start:end].addmm_(rows[:, start:].T, rows[:, start:end])
    return total


def _mirror(total: torch.Tensor) -> None:
    """Above the diagonal what is below it."""
    for start in range(0, len(total), PRODUCTS):
        end = start + PRODUCTS
        total[start:end, end:] = total[end:, start:end].T


def _add_apart(total: torch.Tensor | None, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The sum of (y - x) xT so far."""
    rows = x.flatten(0, -2)
    width = rows.shape[1]
    total = torch.zeros(width, width) if total is None else total
    return total.addmm_((y.flatten(0, -2) - rows).T, rows)


def first_readers(units: Sequence[Unit]) -> dict[Unit, str]:
    """A layer of each unit that reads the unit's input."""
    return {unit: unit.names[0] for unit in units}
