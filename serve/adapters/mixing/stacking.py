"""The files of a mixture: lora_A of all parts above one another, lora_B beside one another, times weight and scaling.

sum of w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], which is exact but for the rounding of B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.mixing.pruning import Pruning, factors
from serve.adapters.peft_config import Patterns, PeftConfig, read_config, scaling_of
from serve.adapters.tensors import Tensor, read_header
from serve.adapters.untrusted import create, open_plain, write
from serve.errors import AdapterRejected

PREFIX = "base_model.model."
# How lora_A and lora_B end, by the kind of module.
ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

Floats = Any  # an array of 32 bits


@dataclass(slots=True)
class _Half:
    """One adapter's tensors of a module."""

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
        for tensor in read_header(self.file):
            for ending in ENDINGS:
                for number, half in enumerate(ending):
                    if tensor.name.endswith(half):
                        name = tensor.name.removeprefix(PREFIX).removesuffix(half)
                        pair = self.modules.setdefault(name, _Half(ending))
                        setattr(pair, "ab"[number], tensor)
                        self.dtypes.add(tensor.dtype)
        self.rank = max((pair.a.shape[0] for pair in self.modules.values() if pair.a), default=0)

    def read(self, tensor: Tensor) -> Floats:
        self.file.seek(tensor.start)
        data = self.file.read(tensor.end - tensor.start)
        if tensor.dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, _NUMPY[tensor.dtype]).astype("<f4")
        return values.reshape(tensor.shape)


def stack(parts: Sequence[tuple[Path, float]], into: Path, pruning: Pruning | None = None) -> int:
    """Write the weighted sum of LoRAs as one into the empty folder `into`; its rank. With `pruning` of what that leaves
    of their updates."""
    sources: list[_Source] = []
    try:
        for folder, weight in parts:
            sources.append(_Source(folder, weight))
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
            a, b = _pruned(sources, name, rank, pruning) if pruning else _stacked(sources, name, rank)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise AdapterRejected("the weights of this mixture are not finite numbers any more: take smaller ones")
        write(sink, _bytes(a, dtype))
        write(sink, _bytes(b, dtype))


def _stacked(sources: Sequence[_Source], name: str, rank: int) -> tuple[Floats, Floats]:
    out, into = _shape(sources, name)
    a, b = np.zeros((rank, into), "<f4"), np.zeros((out, rank), "<f4")
    for _, begin, own_a, own_b in _halves(sources, name):
        a[begin : begin + own_a.shape[0]] = own_a
        b[:, begin : begin + own_b.shape[1]] = own_b
    return a, b


def _pruned(sources: Sequence[_Source], name: str, rank: int, pruning: Pruning) -> tuple[Floats, Floats]:
    updates = [(part, sources[part].weight, b @ a) for part, _, a, b in _halves(sources, name, weighted=False)]
    return factors(pruning.merged(name, updates), rank)


def _shape(sources: Sequence[_Source], name: str) -> tuple[int, int]:
    pair = next(source.modules[name] for source in sources if name in source.modules)
    assert pair.a and pair.b
    return pair.b.shape[0], pair.a.shape[1]


def _halves(
    sources: Sequence[_Source], name: str, *, weighted: bool = True
) -> Iterator[tuple[int, int, Floats, Floats]]:
    """The number of each adapter that has the module, where its rows begin, its lora_A, and its lora_B as it counts in
    the sum; not `weighted`, as it counts in its own update."""
    begin = 0
    patterns = Patterns()
    for number, source in enumerate(sources):
        if pair := source.modules.get(name):
            assert pair.a and pair.b
            factor = scaling_of(name, source.config, patterns) * (source.weight if weighted else 1.0)
            yield number, begin, source.read(pair.a), source.read(pair.b) * np.float32(factor)
        begin += source.rank


def _bytes(values: Floats, dtype: str) -> bytes:
    """Rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype(_NUMPY[dtype]).tobytes()
