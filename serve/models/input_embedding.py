"""The input embedding of a checkpoint folder: one tensor of a safetensors file, mapped."""

from __future__ import annotations

import json
import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import ConfigError
from serve.models.gguf.kept import inputs_of, types_of, values_of

# What the input embedding is called in the checkpoints of the architectures that vLLM serves; the output's stands for
# it where the two are tied and only that one was saved.
NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "embeddings.weight",
    "embedding.weight",
    "lm_head.weight",
)


class Rows:
    """A matrix in a safetensors file, mapped: slices of it become float32, the rest stays on the disk.

    `kept` is the type of its blocks where they are those of a GGUF file, and `shape` then counts bytes.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int], offset: int, kept: str = "") -> None:
        self.shape = (shape[0], inputs_of(kept, shape[1])) if kept else shape
        self._bf16 = dtype == "BF16"
        self._kept = kept
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1"}[dtype]
        self._map = np.memmap(path, kind, "r", offset, shape)

    def __getitem__(self, which: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        part = np.asarray(self._map[which])
        if self._kept:
            read = values_of(self._kept, part)
        else:
            # The upper half of a float32.
            read = (part.astype(np.uint32) << 16).view(np.float32) if self._bf16 else part.astype(np.float32)
        with suppress(AttributeError, OSError, ValueError):  # the pages that were read count as this process's memory
            self._map._mmap.madvise(mmap.MADV_DONTNEED)
        return read


def rows(checkpoint: Path) -> Rows:
    """The input embedding of a checkpoint folder, or ConfigError with the reason."""
    return _open(*source(checkpoint))


def source(checkpoint: Path) -> tuple[Path, str]:
    """The file that the input embedding of a checkpoint folder is in, and its name there."""
    for name in NAMES:
        for tensor, path in sorted(_where(checkpoint).items()):
            if tensor == name or tensor.endswith("." + name):
                return path, tensor
    raise ConfigError(
        f"{checkpoint.name} has no tensor that is called like an input embedding ({', '.join(NAMES[:3])}, ...), "
        "so its prompts cannot be watched for drift; switch drift off for this model"
    )


def _where(checkpoint: Path) -> dict[str, Path]:
    """Every tensor's file."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = dict(json.loads(index.read_bytes())["weight_map"])
        except (ValueError, KeyError, TypeError) as damaged:
            raise ConfigError(f"{index.name} cannot be read ({damaged}); fetch the checkpoint again") from damaged
        return {tensor: checkpoint / str(shard) for tensor, shard in shards.items()}
    tensors = {tensor: path for path in sorted(checkpoint.glob("*.safetensors")) for tensor in _header(path)[0]}
    if not tensors:
        raise ConfigError(f"{checkpoint.name} holds no safetensors file; drift needs the embedding table of the model")
    return tensors


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors of a safetensors file, and where their bytes begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100 << 20:
                raise ValueError("its header is larger than the format allows")
            tensors = json.loads(file.read(length))
    except (OSError, ValueError) as damaged:
        raise ConfigError(f"{path.name} is not a safetensors file ({damaged}); fetch the checkpoint again") from damaged
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def _open(path: Path, tensor: str) -> Rows:
    tensors, begin = _header(path)
    entry = tensors.get(tensor)
    if entry is None:
        raise ConfigError(f"the index names {path.name} for {tensor}, which is not in it; fetch the checkpoint again")
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    kept = types_of(path.parent).get(tensor.removesuffix(".weight"), "") if dtype == "U8" else ""
    if not (kept or dtype in ("BF16", "F16", "F32")) or len(shape) != 2:
        raise ConfigError(
            f"{tensor} is {dtype} {list(shape)}; drift reads an embedding of two dimensions in BF16, F16 or F32"
        )
    start, end = entry["data_offsets"]
    if path.stat().st_size < begin + end:
        raise ConfigError(f"{path.name} was cut short; fetch the checkpoint again")
    return Rows(path, dtype, shape, begin + start, kept)
