"""The files of a mixture: lora_A of all parts above one another, lora_B beside one another, times weight and scaling.

sum of w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], which is exact but for the rounding of B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.mixing.pruning import Pruning, factors
from serve.adapters.module_names import PREFIX, bare
from serve.adapters.peft_config import Patterns, PeftConfig, read_config, scaling_of
from serve.adapters.saved_modules import saved_module
from serve.adapters.tensors import Tensor, read_header
from serve.adapters.untrusted import create, open_plain, write
from serve.errors import AdapterRejected
from serve.names import shown

# How lora_A and lora_B end, by the kind of module.
ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# As arrays that are written: bfloat16 by its bits.
_WRITTEN = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
# By the types of 16 bits, the bits of the exponent: all set in NaN and infinity.
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00}
# Factors of an adapter that get a table; further ones, of many alphas, are computed.
_TABLES = 2

Floats = Any  # an array of 32 bits


@dataclass(slots=True)
class _Half:
    """One adapter's tensors of a module, and what it calls that."""

    name: str
    ending: tuple[str, str]
    a: Tensor | None = None
    b: Tensor | None = None


class _Source:
    """One adapter's files; its version was admitted, so they are sound."""

    def __init__(self, folder: Path, weight: float) -> None:
        self.config: PeftConfig = read_config(folder / CONFIG)
        if self.config.raw.get("use_dora"):
            raise AdapterRejected(
                "one of these adapters is a DoRA, which scales the base's own outputs, so it adds up with no other: "
                "leave it out of the mixture"
            )
        self.weight = weight
        self.file: BinaryIO = open_plain(folder / WEIGHTS)
        self.modules: dict[str, _Half] = {}
        self.dtypes: set[str] = set()
        self._tables: dict[float, Any] = {}
        for tensor in read_header(self.file):
            self._take(tensor)
        self.rank = max((pair.a.shape[0] for pair in self.modules.values() if pair.a), default=0)
        self._patterns = Patterns()

    def _take(self, tensor: Tensor) -> None:
        """Keep a half of a module's pair."""
        for ending in ENDINGS:
            for number, half in enumerate(ending):
                if tensor.name.endswith(half):
                    name = tensor.name.removeprefix(PREFIX).removesuffix(half)
                    pair = self.modules.setdefault(name, _Half(name, ending))
                    setattr(pair, "ab"[number], tensor)
                    self.dtypes.add(tensor.dtype)
                    return
        if saved_module(tensor.name):
            raise AdapterRejected(
                f"one of these adapters brings a table or a head of its own (`{shown(tensor.name)}`), which adds up "
                "with no other: leave it out of the mixture"
            )

    def scaling(self, name: str) -> float:
        """Of its own update of a module."""
        return scaling_of(self.modules[name].name, self.config, self._patterns)

    def read(self, tensor: Tensor) -> Floats:
        data = self._data(tensor)
        if tensor.dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, _NUMPY[tensor.dtype]).astype("<f4")
        return values.reshape(tensor.shape)

    def as_written(self, tensor: Tensor, dtype: str) -> Any:
        """As an array that is written; of the same type as it is in the file, without a look at it."""
        if tensor.dtype == dtype:
            return np.frombuffer(self._data(tensor), _WRITTEN[dtype]).reshape(tensor.shape)
        return _rounded(self.read(tensor), dtype)

    def scaled(self, tensor: Tensor, factor: float, dtype: str) -> Any:
        """Times a factor, as an array that is written. Numbers of 16 bits are looked up, which is quicker than NumPy
        computes with halves."""
        table = self._table(factor, dtype) if tensor.dtype == dtype else None
        if table is None:
            return _rounded(self.read(tensor) * np.float32(factor), dtype)
        # Whatever the mode: any number of 16 bits is an index. This one looks at none of them, and takes half the time.
        return table.take(np.frombuffer(self._data(tensor), "<u2"), mode="wrap").reshape(tensor.shape)

    def _table(self, factor: float, dtype: str) -> Any:
        """Each number of 16 bits times the factor; None where there is no table."""
        if factor not in self._tables and (dtype not in _EXPONENT or len(self._tables) >= _TABLES):
            return None
        if factor not in self._tables:
            numbers = np.arange(1 << 16, dtype="<u4")
            every = (numbers << 16).view("<f4") if dtype == "BF16" else numbers.astype("<u2").view("<f2").astype("<f4")
            self._tables[factor] = _rounded(every * np.float32(factor), dtype)
        return self._tables[factor]

    def _data(self, tensor: Tensor) -> bytes:
        self.file.seek(tensor.start)
        return self.file.read(tensor.end - tensor.start)


def stack(parts: Sequence[tuple[Path, float]], into: Path, pruning: Pruning | None = None) -> int:
    """Write the weighted sum of LoRAs as one into the empty folder `into`; its rank. With `pruning` of what that leaves
    of their updates."""
    sources: list[_Source] = []
    try:
        for folder, weight in parts:
            sources.append(_Source(folder, weight))
        _call_alike(sources)
        names = list(dict.fromkeys(name for source in sources for name in source.modules))
        shapes = [_shape(sources, name) for name in names]
        rank = pruning.rank(shapes) if pruning else sum(source.rank for source in sources)
        dtypes = set().union(*(source.dtypes for source in sources))
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= {"BF16", "F16"} else "F32"
        endings = {name: pair.ending for source in sources for name, pair in source.modules.items()}
        with create(into / WEIGHTS) as sink:
            _write(sink, sources, endings, rank, dtype, pruning)
    finally:
        for source in sources:
            source.file.close()
    first = sources[0].config
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in endings}),
        "base_model_name_or_path": first.base,
    }
    with create(into / CONFIG) as sink:
        write(sink, json.dumps(settings, sort_keys=True).encode())
    return rank


def _call_alike(sources: Sequence[_Source]) -> None:
    """Have all parts call a module by one name, where one was trained with a head and another without."""
    called = {bare(name): name for source in sources for name in source.modules}
    for source in sources:
        source.modules = {called[bare(name)]: pair for name, pair in source.modules.items()}


def _write(
    sink: IO[bytes],
    sources: Sequence[_Source],
    endings: dict[str, tuple[str, str]],
    rank: int,
    dtype: str,
    pruning: Pruning | None,
) -> None:
    """The tensors of every module, one after the other."""
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    entries: dict[str, Any] = {}
    at = 0
    for name, ending in endings.items():
        out, into = _shape(sources, name)
        for half, shape in zip(ending, ((rank, into), (out, rank)), strict=True):
            end = at + width * math.prod(shape)
            entries[f"{PREFIX}{name}{half}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write(sink, len(header).to_bytes(8, "little") + header)
    for name in endings:
        with np.errstate(over="ignore", invalid="ignore"):
            if pruning:
                halves = _pruned(sources, name, rank, dtype, pruning)
            else:
                halves = _stacked(sources, name, rank, dtype)
        # What is stacked of lora_A is as it was admitted.
        if not all(_is_finite(half, dtype) for half in halves[0 if pruning else 1 :]):
            raise AdapterRejected("the weights of this mixture are not finite numbers any more: take smaller ones")
        for half in halves:
            write(sink, memoryview(np.ascontiguousarray(half)).cast("B"))


def _stacked(sources: Sequence[_Source], name: str, rank: int, dtype: str) -> tuple[Any, Any]:
    """lora_A and lora_B as they are written."""
    out, into = _shape(sources, name)
    a, b = np.zeros((rank, into), _WRITTEN[dtype]), np.zeros((out, rank), _WRITTEN[dtype])
    begin = 0
    for source in sources:
        if pair := source.modules.get(name):
            assert pair.a and pair.b
            factor = source.weight * source.scaling(name)
            a[begin : begin + pair.a.shape[0]] = source.as_written(pair.a, dtype)
            b[:, begin : begin + pair.b.shape[1]] = source.scaled(pair.b, factor, dtype)
        begin += source.rank
    return a, b


def _pruned(sources: Sequence[_Source], name: str, rank: int, dtype: str, pruning: Pruning) -> tuple[Any, Any]:
    """The same of what pruning leaves of the updates."""
    updates = []
    for part, source in enumerate(sources):
        if pair := source.modules.get(name):
            assert pair.a and pair.b
            update = source.read(pair.b) @ source.read(pair.a) * np.float32(source.scaling(name))
            updates.append((part, source.weight, update))
    a, b = factors(pruning.merged(name, updates), rank)
    return _rounded(a, dtype), _rounded(b, dtype)


def _shape(sources: Sequence[_Source], name: str) -> tuple[int, int]:
    pair = next(source.modules[name] for source in sources if name in source.modules)
    assert pair.a and pair.b
    return pair.b.shape[0], pair.a.shape[1]


def _rounded(values: Floats, dtype: str) -> Any:
    """To the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype(_WRITTEN[dtype])


def _is_finite(written: Any, dtype: str) -> bool:
    if (exponent := _EXPONENT.get(dtype)) is None:
        return bool(np.isfinite(written).all())
    return bool((written.view("<u2") & 0x7FFF).max(initial=0) < exponent)
