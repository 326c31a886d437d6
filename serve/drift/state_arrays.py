"""The state of a whole, as arrays for `numpy.savez`: those of each part under names that begin with its prefix."""

from __future__ import annotations

from collections.abc import Mapping

from numpy.typing import NDArray


def prefixed(arrays: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    """The arrays of a part, as they are called in the whole."""
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def below(arrays: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    """The arrays of a part, out of those of the whole."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
