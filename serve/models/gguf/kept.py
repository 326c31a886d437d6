"""Which weights of a GGUF file stay as they are: those that the kernels multiply in the file's own blocks.

A layer of vLLM's is one matrix of several tensors, whose rows lie side by side in blocks of 32: of two types they have
to part there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from serve.models.gguf.file import TYPES, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHOD = "loradock-gguf"  # in config.json, as `quant_method`: vLLM looks it up among its methods
# Where the scales of a block are, float16, from its beginning: all else that is there are whole numbers.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
BLOCKS = {name: (weights, nbytes) for name, weights, nbytes in TYPES.values() if name in SCALES}
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS, ROWS_APART = 16, 32  # the outputs of a layer, and those of a tensor beside one of another type, are a multiple


def kept_types(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By the checkpoint's names of modules, the types of those whose weights are kept.

    names: of each tensor in the file, its name in the checkpoint.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for source, name in names.items():
        module, _, what = name.rpartition(".")
        if what == "weight" and len(tensors[source].shape) == 2:
            layers.setdefault(_layer(module), {})[module] = tensors[source]
    kept = [parts for layer, parts in layers.items() if _fits(layer, list(parts.values()))]
    return {module: tensor.type for parts in kept for module, tensor in parts.items()}


def types_of(folder: Path) -> dict[str, str]:
    """By name, the types of the modules of a checkpoint folder whose weights are kept; none of another folder."""
    try:
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        return dict(said["types"]) if said["quant_method"] == METHOD else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def values_of(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(rows, bytes) in blocks of this type as the numbers that they stand for, (rows, weights)."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    return np.asarray(dequantize(rows, GGMLQuantizationType[kind]), np.float32)


def modules_of(layer: str, known: Iterable[str]) -> list[str]:
    """The checkpoint's modules of which a layer of vLLM's is made, in order."""
    path, _, last = layer.rpartition(".")
    if layer in known or last not in MERGED:
        return [layer]
    return [f"{path}.{part}" for part in MERGED[last]]


def inputs_of(kind: str, row_bytes: int) -> int:
    """Of a row of so many bytes."""
    weights, nbytes = BLOCKS[kind]
    return row_bytes // nbytes * weights


def _layer(module: str) -> str:
    path, _, last = module.rpartition(".")
    merged = next((name for name, parts in MERGED.items() if last in parts), last)
    return f"{path}.{merged}" if path else merged


def _fits(layer: str, parts: list[Tensor]) -> bool:
    kinds = {tensor.type for tensor in parts}
    if not kinds <= SCALES.keys():
        return False
    if re.search(r"(^|\.)(embed_tokens|lm_head)$", layer):
        return True  # vLLM fills them up
    if sum(tensor.shape[0] for tensor in parts) % ROWS:
        return False
    if layer.endswith("gate_up_proj"):  # a block has rows of both
        return len(kinds) == 1
    return len(kinds) == 1 or all(tensor.shape[0] % ROWS_APART == 0 for tensor in parts)
