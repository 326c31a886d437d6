"""The linear layers inside a decoder's layers, by name and shape alone: nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.errors import Refused


def linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is the weight of a linear layer inside the decoder's layers."""
    return len(shape) == 2 and re.search(r"\.\d+\.", name) is not None and name.endswith("_proj.weight")


def input_widths(base: Checkpoint) -> set[int]:
    """Input widths of the linear layers inside the decoder's layers."""
    return {shape[1] for name, shape in base.shapes.items() if linear(name, shape)}


def undivided(base: Checkpoint, size: int) -> list[int]:
    """Input widths of linear layers that `size` does not divide."""
    return sorted(width for width in input_widths(base) if width % size)


def group(base: Checkpoint, wished: int) -> int:
    """The group size: the wished one when it divides every layer's width, else the largest of 128, 64 and 32."""
    widths = input_widths(base)
    if wished and any(width % wished for width in widths):
        raise Refused(
            f"groups of {wished} do not divide layers of width {sorted(widths)}; leave `group` out to have one chosen"
        )
    for size in [wished] if wished else (128, 64, 32):
        if not any(width % size for width in widths):
            return size
    raise Refused(f"layers of width {sorted(widths)} have no group size that vLLM takes (128, 64 or 32): take w8a8")


def ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is named in full, by its last word, or by a `re:` pattern, as compressed-tensors has them."""
    return any(
        re.match(pattern[3:], name) is not None
        if pattern.startswith("re:")
        else pattern in (name, name.rpartition(".")[2])
        for pattern in patterns
    )
