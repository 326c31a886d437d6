"""A GGUF file: its metadata, and where its tensors lie. Everything is checked before a tensor's bytes are read.

The format (version 3, and 2, which is laid out the same way):
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic, version, counts of tensors and keys | metadata: key, type, value | tensors: name, sizes, type, offset | data
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from serve.models.gguf.names import MAGIC

VERSIONS = (2, 3)
# The most of a file. 128k words and 400k merges are many.
TENSORS = 100_000
KEYS = 10_000
ITEMS = 4_000_000
STRING = 4 << 20
NAME = 256
RANK = 4
NESTED = 1
# Of GGUF's scalar types, by number: how `struct` reads them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# ggml's types that are read here: name, weights of a block, bytes of it.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """shape: outputs first, as PyTorch has it (the file has the inputs first)."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    begin: int  # in its file
    nbytes: int

    @property
    def number(self) -> int:
        return TYPE_NUMBERS[self.type]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


TYPE_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


@dataclass(frozen=True, slots=True)
class GGUF:
    """A model's file, or all its parts."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> GGUF:
        """ConfigError: what is wrong with it, in a sentence."""
        metadata, tensors = _read(path)
        parts = metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            for other in _others(path, metadata.get("split.no"), parts):
                for name, tensor in _read(other)[1].items():
                    if name in tensors:
                        raise ConfigError(f"{other.name} has a tensor {name!r} that another part has too")
                    tensors[name] = tensor
        return cls(path, metadata, tensors)

    def text(self, key: str) -> str:
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path.name} has no {key}, or it is no text")
        return value

    def whole(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A whole number of at least 1."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"{key} of {self.path.name} is {value!r}: a number from 1 to {most} is taken")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{key} of {self.path.name} is {value!r}: a number is taken")
        return float(value)

    def array(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ConfigError(f"{key} of {self.path.name} is no list of {kind.__name__}")
        return value


class _Reader:
    """Values one after the other; none is read beyond the end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        if size < 0 or size > len(self.data) - self.at:
            raise ConfigError(f"{self.name} ends within {what}: it is cut off or broken, fetch it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, most: int, what: str) -> int:
        value = int(self.scalar("Q", what))
        if value > most:
            raise ConfigError(f"{self.name} names {value} as {what}: at most {most} are taken")
        return value

    def string(self, most: int, what: str) -> str:
        raw = self.take(self.count(most, f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{what} of {self.name} is not UTF-8") from None

    def value(self, kind: int, what: str, nested: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == TEXT:
            return self.string(STRING, what)
        if kind != ARRAY or nested > NESTED:
            raise ConfigError(f"{what} of {self.name} is of the unknown type {kind}")
        kind = self.scalar("I", what)
        items = self.count(ITEMS, f"items of {what}")
        if kind in SCALARS:
            code = SCALARS[kind]
            return list(struct.unpack(f"<{items}{code}", self.take(items * struct.calcsize(f"<{code}"), what)))
        # An item takes eight bytes at least: so many of them cannot be there unless the file has room for them.
        if items > (len(self.data) - self.at) // 8:
            raise ConfigError(f"{self.name} ends within {what}: it is cut off or broken, fetch it again")
        return [self.value(kind, what, nested + 1) for _ in range(items)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(_Reader(data, path.name), path)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parsed(reader: _Reader, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if reader.take(4, "its first bytes") != MAGIC:
        raise ConfigError(f"{path.name} is no GGUF file: it does not begin with the letters GGUF")
    version = reader.scalar("I", "its version")
    if version not in VERSIONS:
        raise ConfigError(
            f"{path.name} is of version {version} of GGUF: 2 and 3 are read (3 with the lowest byte first)"
        )
    tensors, keys = reader.count(TENSORS, "its tensors"), reader.count(KEYS, "its keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string(NAME, "a key")
        if key in metadata:
            raise ConfigError(f"{path.name} says {key!r} twice")
        metadata[key] = reader.value(reader.scalar("I", key), key)
    listed = [_listed(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (1 << power for power in range(3, 21)):
        raise ConfigError(f"general.alignment of {path.name} is {alignment!r}: a power of two from 8 is taken")
    begin = (reader.at + alignment - 1) // alignment * alignment
    return metadata, dict(_placed(listed, path, begin, alignment, len(reader.data)))


def _listed(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string(NAME, "a tensor's name")
    rank = reader.scalar("I", name)
    if not 1 <= rank <= RANK:
        raise ConfigError(f"tensor {name!r} of {reader.name} has {rank} dimensions: 1 to {RANK} are taken")
    sizes = struct.unpack(f"<{rank}Q", reader.take(8 * rank, name))
    return name, sizes[::-1], reader.scalar("I", name), reader.scalar("Q", name)


def _placed(
    listed: list[tuple[str, tuple[int, ...], int, int]], path: Path, begin: int, alignment: int, end: int
) -> Iterator[tuple[str, Tensor]]:
    """Each within the file, none over another."""
    names, last = set[str](), begin
    for name, shape, kind, offset in sorted(listed, key=lambda one: one[3]):
        if name in names:
            raise ConfigError(f"{path.name} has the tensor {name!r} twice")
        names.add(name)
        if kind not in TYPES:
            known = ", ".join(TYPE_NUMBERS)
            raise ConfigError(f"tensor {name!r} of {path.name} is of ggml's type {kind}: these are read: {known}")
        label, block, nbytes = TYPES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise ConfigError(f"tensor {name!r} of {path.name} has the sizes {list(shape)}, which {label} cannot have")
        size = math.prod(shape) // block * nbytes
        if offset % alignment or begin + offset < last or begin + offset + size > end:
            raise ConfigError(
                f"tensor {name!r} of {path.name} does not lie where it may (byte {begin + offset}, {size} bytes): "
                "the file is cut off or broken, fetch it again"
            )
        last = begin + offset + size
        yield name, Tensor(name, shape, label, path, begin + offset, size)


def _others(path: Path, number: Any, parts: int) -> Iterator[Path]:
    """The further parts, by `llama.cpp`'s names; the first one is what is served."""
    first = f"-00001-of-{parts:05d}.gguf"
    if number != 0 or not path.name.endswith(first):
        raise ConfigError(f"{path.name} is one of {parts} parts: serve the first one, whose name ends in {first}")
    for part in range(2, parts + 1):
        other = path.with_name(path.name.removesuffix(first) + f"-{part:05d}-of-{parts:05d}.gguf")
        if not other.is_file():
            raise ConfigError(f"{other.name} is missing beside {path.name}, which has {parts} parts")
        yield other
