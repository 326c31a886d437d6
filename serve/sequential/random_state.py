"""A random generator as an array, so that what was saved goes on with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1


def rng_state(rng: np.random.Generator) -> NDArray[np.uint64]:
    """PCG64's two 128-bit numbers and its half-used word, as six 64-bit ones."""
    inner = rng.bit_generator.state
    numbers: Sequence[int] = (inner["state"]["state"], inner["state"]["inc"])
    words = [part for number in numbers for part in (number >> 64, number & _WORD)]
    return np.array([*words, inner["has_uint32"], inner["uinteger"]], np.uint64)


def rng_from(words: NDArray[np.uint64]) -> np.random.Generator:
    """The generator whose `rng_state` this was; ValueError if it is none."""
    a, b, c, d, has, half = (int(word) for word in words)
    inner = np.random.PCG64()
    try:
        inner.state = {
            "bit_generator": "PCG64",
            "state": {"state": a << 64 | b, "inc": c << 64 | d},
            "has_uint32": has,
            "uinteger": half,
        }
    except OverflowError as error:
        raise ValueError(f"the state of the random numbers is none of PCG64: {error}") from error
    return np.random.Generator(inner)
