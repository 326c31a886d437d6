"""What a JSON text holds, counted in one pass over its bytes before anything is built of it.

The bytes of a body say little of what it costs: 4 MiB may be one prompt, or a million empty lists of 64 bytes each that
every model of a request is compared with. Every JSON that came from a client is looked at here first: bodies of all
routes, lines of batches and of files to train on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from serve.errors import BadRequest, TooLarge

T = TypeVar("T")

_MARKS = b'[]{},:"'
_OTHERS = bytes(set(range(256)) - set(_MARKS))
_OPENING = b"[{"
_CLOSING = b"]}"
_QUOTE = ord('"')
_STEPS = np.zeros(256, np.int8)
_STEPS[list(_OPENING)] = 1
_STEPS[list(_CLOSING)] = -1


# The largest honest bodies are far below: 200 tools with 20 parameters each are 5,000 lists and objects,
# and a prompt of 128,000 token ids is as many values.
CONTAINERS = 1 << 15
VALUES = 1 << 20
KEYS = 1 << 17
DEPTH = 100
# Brackets, commas, colons and quotes together, those in strings too: 4 MiB of code have fewer.
_MARKS_BOUND = 8 << 20


@dataclass(frozen=True, slots=True)
class Weight:
    """`containers` are lists and objects, `values` what these hold, `keys` the objects' keys."""

    containers: int
    values: int
    keys: int
    depth: int


def decoded(data: bytes, decode: Callable[[bytes], T]) -> T:
    """What `decode` builds of it; TooLarge or BadRequest, if it holds more than a client's JSON may."""
    check(data)
    return decode(data)


def check(data: bytes) -> None:
    """TooLarge, if it holds too much; BadRequest, if it is too deep."""
    marks = _marks(data)
    if len(marks) <= DEPTH:  # no bound can be passed with so few
        return
    if len(marks) > _MARKS_BOUND:
        raise TooLarge(f"the JSON has {len(marks)} brackets, commas, colons and quotes: send it in parts")
    weight = _weight(marks)
    for count, bound, what in (
        (weight.containers, CONTAINERS, "lists and objects"),
        (weight.values, VALUES, "values"),
        (weight.keys, KEYS, "keys"),
    ):
        if count > bound:
            raise TooLarge(f"the JSON holds {count} {what}, and {bound} are the most that is taken: send it in parts")
    if weight.depth > DEPTH:
        raise BadRequest(f"the JSON nests {weight.depth} deep, and {DEPTH} is the most that is taken")


def weighed(data: bytes) -> Weight:
    """What a JSON text holds; of one that is none at least what comes before its first mistake."""
    return _weight(_marks(data))


def _marks(data: bytes) -> bytes:
    """What may separate values, and the quotes that strings stand in."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return data.translate(None, _OTHERS)


def _weight(marks: bytes) -> Weight:
    codes = np.frombuffer(marks, np.uint8)
    quotes = codes == _QUOTE
    if quotes.any():
        codes = codes[~(np.logical_xor.accumulate(quotes) | quotes)]
    counts = np.bincount(codes, minlength=128)
    containers = int(counts[list(_OPENING)].sum())
    values = containers + int(counts[ord(",")])
    depth = containers  # of so many it is refused, however deep
    if DEPTH < containers <= CONTAINERS:
        depth = int(np.cumsum(_STEPS[codes], dtype=np.int32).max())
    return Weight(containers, values, int(counts[ord(":")]), depth)
