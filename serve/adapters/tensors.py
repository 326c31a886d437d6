"""The tensors of a safetensors file, read as untrusted bytes.

The format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, raw data).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from serve.adapters.adapter import WEIGHTS
from serve.adapters.file_thread import rest
from serve.adapters.untrusted import parse_json, sniff
from serve.errors import AdapterRejected
from serve.names import shown

_HEADER_BYTES = 16 << 20

# The exponent bits (all set: NaN or infinity), by safetensors dtype. The sign is the top bit of each.
FLOATS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as the header describes it; `start` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, filename: str = WEIGHTS) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of their bytes, which must fill it without gap or overlap."""
    header, _, start, size = _read(file, filename)
    tensors = sorted(
        (_tensor(name, entry, start, filename) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    at = start
    for tensor in tensors:
        if tensor.start != at:
            raise AdapterRejected(
                f"`{shown(tensor.name)}` begins at byte {tensor.start} of {filename} and not at {at}; save it again"
            )
        at = tensor.end
    if at != size:
        short = "it was cut short" if at > size else "there are bytes that belong to no tensor"
        raise AdapterRejected(f"{filename} should end at byte {at} and is {size} long: {short}; send it again")
    return tensors


def read_metadata(file: BinaryIO, filename: str = WEIGHTS) -> dict[str, str]:
    """What whoever saved a safetensors file wrote beside its tensors."""
    return _read(file, filename)[1]


def header_length(head: bytes, filename: str = WEIGHTS) -> int:
    """How many bytes of header a safetensors file says it has; `head` is its beginning, 9 bytes or more of it.

    AdapterRejected if it begins as something else: a bomb or a pickle under that name ends with its first bytes.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{":
        what = sniff(head) or ("empty" if not head else "damaged, or something else under that name")
        raise AdapterRejected(
            f"{filename} is not a safetensors file: it is {what}; save the adapter with save_pretrained(..., "
            "safe_serialization=True) and send that"
        )
    if length > _HEADER_BYTES:
        raise AdapterRejected(f"the header of {filename} is {length} bytes; this server reads up to {_HEADER_BYTES}")
    return length


def _read(file: BinaryIO, filename: str) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """The header's entries, its metadata, where the tensors begin, and the file's size, in bytes."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    length = header_length(file.read(64), filename)
    if length > size - 8:
        raise AdapterRejected(f"{filename} is shorter than its header says: it was cut short; send it again")
    file.seek(8)
    header = parse_json(file.read(length), f"the header of {filename}")
    if not isinstance(header, dict):
        raise AdapterRejected(f"the header of {filename} is not a JSON object; save the adapter again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRejected(f"the __metadata__ of {filename} may only map strings to strings; save the adapter again")
    return header, metadata, 8 + length, size


def _tensor(name: str, entry: Any, base: int, filename: str) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
            len(entry) == 3
            and len(shape) <= 8
            and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
            and type(start) is int
            and type(end) is int
            and 0 <= start <= end
        ):
            if dtype not in _BITS:
                raise AdapterRejected(
                    f"`{shown(name)}` has the unknown type {shown(dtype)}; save the adapter as BF16, F16 or F32"
                )
            if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
                raise AdapterRejected(
                    f"`{shown(name)}` says {dtype} {shape} and holds {end - start} bytes; save the adapter again"
                )
            return Tensor(name, dtype, tuple(shape), base + start, base + end)
    raise AdapterRejected(
        f"the header of {filename} describes `{shown(name)}` wrongly: {shown(entry)}; save the adapter again"
    )


def scan(file: BinaryIO, tensor: Tensor) -> tuple[bool, bool]:
    """(all finite, all zero), from the bits: NumPy has no bfloat16."""
    import numpy as np

    kind, exponent = FLOATS[tensor.dtype]
    width = np.dtype(kind).itemsize
    finite, zero = True, True
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        data = file.read(min(left, 1 << 20))
        if not data:
            raise AdapterRejected(f"{WEIGHTS} was cut short while it was read; send it again")
        rest()
        left -= len(data)
        bits = np.frombuffer(data, kind)
        finite = finite and not bool(((bits & exponent) == exponent).any())
        zero = zero and not bool((bits & ((1 << (8 * width - 1)) - 1)).any())
    return finite, zero
