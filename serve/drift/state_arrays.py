"""The state of a whole, as arrays for `numpy.savez`: those of each part under names that begin with its prefix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


def prefixed(arrays: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    """The arrays of a part, as they are called in the whole."""
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def own(shape: int | tuple[int, ...], value: ArrayLike, dtype: DTypeLike = np.float64) -> NDArray:
    """An array of this shape and type, filled with what was read; ValueError where it does not fit."""
    made = np.empty(shape, dtype)
    made[...] = value
    return made


def below(arrays: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    """The arrays of a part, out of those of the whole."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
