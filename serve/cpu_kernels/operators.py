"""The operators that vLLM's layers call: `lora_linear`, `lora_embedding`, `packed_linear`, and what they work on.

The compiler sees them as opaque: what they do depends on the step's plan and on the slots' contents, which are looked
up when they run. `kernels.cpp` implements them; where it cannot be compiled, the functions below do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from serve.cpu_kernels.build import library

# Without the kernels: with fewer rows than this for an adapter, a copy of its weights for each row is quicker than the
# calls for a product of its own.
GATHERED = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_operators = torch.library.Library("loradock", "DEF")
_operators.define("lora_linear(Tensor(a!) y, Tensor x, int layer) -> ()")
_operators.define("lora_embedding(Tensor(a!) y, Tensor x, int layer) -> ()")
_operators.define("packed_linear(Tensor x, int matrix, int outputs) -> Tensor")


@torch.library.register_fake("loradock::lora_linear")
def _lora_linear_fake(y: torch.Tensor, x: torch.Tensor, layer: int) -> None: ...


@torch.library.register_fake("loradock::lora_embedding")
def _lora_embedding_fake(y: torch.Tensor, x: torch.Tensor, layer: int) -> None: ...


@torch.library.register_fake("loradock::packed_linear")
def _packed_linear_fake(x: torch.Tensor, matrix: int, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def takes(dtype: torch.dtype) -> bool:
    """Whether the operators can compute with this type on this machine."""
    kernels = library()
    return dtype in DTYPES and (kernels is None or bool(kernels.loradock_types() >> DTYPES[dtype] & 1))


lora_linear = torch.ops.loradock.lora_linear.default
lora_embedding = torch.ops.loradock.lora_embedding.default
packed_linear = torch.ops.loradock.packed_linear.default


class Plan:
    """Which rows of a step belong to which adapter slot; grouped once, used by every layer."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, torch.Tensor]] = []
        self.rows = self.slots = torch.empty(0, dtype=torch.int64)
        self._mapping = self.slots
        self._kernels = library()
        self._number = self._kernels.loradock_plan() if self._kernels else 0

    def set(self, slots: torch.Tensor, slot_count: int) -> None:
        """`slots` holds the slot of each row, -1 where there is none; (rows,) of int64."""
        self._mapping = slots
        if self._kernels is None:
            self.rows = (slots >= 0).nonzero().flatten()
            self.slots = slots[self.rows]
            self.groups = [(slot, (slots == slot).nonzero().flatten()) for slot in self.slots.unique().tolist()]
            return
        slots = slots.contiguous()
        self._kernels.loradock_set_plan(self._number, ctypes.c_void_p(slots.data_ptr()), slots.numel(), slot_count)

    @property
    def size(self) -> int:
        """The rows of this step."""
        return self._mapping.shape[0]

    def in_use(self) -> frozenset[int]:
        """The slots of this step's rows."""
        return frozenset(self._mapping.tolist()) - {-1}


@dataclass(eq=False)
class Layer:
    """One module's stacked adapters: A (slots, 1, rank, in) and B (slots, 1, out, rank) for each slice of its y."""

    plan: Plan
    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]
    sizes: Sequence[int]
    looked_up: bool = False  # an embedding's A, which vLLM looks up itself
    packed: bool = False  # A and B are read by the kernels alone, which hold a copy of B, or of both
    number: int = field(init=False)
    used: bool = field(default=False, init=False)  # any slot holds something here

    def __post_init__(self) -> None:
        kernels = library()
        if kernels is None:
            self.number = len(_layers)
            _layers.append(self)
            return
        count = len(self.sizes)
        offsets = [sum(self.sizes[:i]) for i in range(count)]
        first = self.b[0]
        self.number = kernels.loradock_layer(
            self.plan._number,
            DTYPES[first.dtype],
            first.shape[-1],
            first.shape[0],
            count,
            (ctypes.c_void_p * count)(*(a.data_ptr() for a in self.a)),
            (ctypes.c_void_p * count)(*(b.data_ptr() for b in self.b)),
            (ctypes.c_int * count)(*(a.shape[-1] for a in self.a)),
            (ctypes.c_int * count)(*self.sizes),
            (ctypes.c_int * count)(*offsets),
            self.looked_up,
        )

    def rank(self, slot: int) -> int:
        """The rank of what the slot holds here; 0 for nothing."""
        kernels = library()
        if kernels is not None:
            return int(kernels.loradock_rank(self.number, slot))
        return self.b[0].shape[-1]

    def keep_eight_bits(self) -> None:
        """Keep what is loaded from now on in 8 bits, as the weights beside it are."""
        if (kernels := library()) is not None:
            kernels.loradock_keep_eight_bits(self.number)

    def unread(self, slot: int) -> list[torch.Tensor]:
        """What lies in a slot and is not read, because the kernels hold copies of their own."""
        kernels = library()
        if kernels is None or not self.packed:
            return []
        copied = self.b if kernels.loradock_reads_a(self.number, slot) else (*self.a, *self.b)
        return [stacked[slot] for stacked in copied]

    def touched(self) -> bool:
        """Whether a row of this step has an adapter here."""
        return self.used and any(self.rank(slot) for slot in self.plan.in_use())

    def rows(self) -> list[int]:
        """The rows of this step that have an adapter here."""
        if not self.used:
            return []
        mine = {slot for slot in self.plan.in_use() if self.rank(slot)}
        return [row for row, slot in enumerate(self.plan._mapping.tolist()) if slot in mine]


_layers: list[Layer] = []


def load(layers: Sequence[Layer], slot: int) -> None:
    """Take in what vLLM has just copied into a slot."""
    if (kernels := library()) is not None:
        numbers = (ctypes.c_int * len(layers))(*(layer.number for layer in layers))
        kernels.loradock_load(numbers, len(layers), slot)
    for layer in layers:
        layer.used = any(layer.rank(slot) for slot in range(layer.b[0].shape[0]))


def _lora_linear(y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
    it, offset = _layers[layer], 0
    for a, b, size in zip(it.a, it.b, it.sizes, strict=True):
        mine = y[:, offset : offset + size]
        if it.plan.rows.numel() < GATHERED * len(it.plan.groups):
            slots, rows = it.plan.slots, it.plan.rows
            shrunk = torch.einsum("ti,tri->tr", x[rows], a[slots, 0])
            mine.index_add_(0, rows, torch.einsum("tr,tor->to", shrunk, b[slots, 0]))
        else:
            for slot, rows in it.plan.groups:
                mine.index_add_(0, rows, (x[rows] @ a[slot, 0].T) @ b[slot, 0].T)
        offset += size


def _lora_embedding(y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
    it = _layers[layer]
    for slot, rows in it.plan.groups:
        y.index_add_(0, rows, x[rows] @ it.b[0][slot, 0].T)


def _packed_linear(x: torch.Tensor, matrix: int, outputs: int) -> torch.Tensor:
    """x times a packed matrix, its bias added; bfloat16."""
    kernels = library()
    assert kernels is not None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty((rows.shape[0], outputs))
    kernels.loradock_linear(
        matrix,
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(rows.stride(0)),
        rows.shape[0],
        ctypes.c_void_p(y.data_ptr()),
    )
    return y.view(*x.shape[:-1], outputs)


_operators.impl("packed_linear", _packed_linear, "CPU")
if library() is None:
    _operators.impl("lora_linear", _lora_linear, "CPU")
    _operators.impl("lora_embedding", _lora_embedding, "CPU")
