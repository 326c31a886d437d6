"""What an engine takes of a CPU's memory, from the headers of its checkpoint's files: nothing is loaded for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.models.gguf.kept import METHOD, inputs_of

# Bits of a weight, with its group's scale, that bfloat16 weights become (serve/cpu_kernels/packing.py).
BITS = {"int8": 8 + 32 / 64, "int4": 4 + 16 / 32}
# What the output layer becomes where weights become fewer bits.
HEAD_BITS = BITS["int8"]
FLOATS = ("BF16", "F16", "F32")
# Bytes of an embedding that the fused step looks up in a file (serve/cpu_kernels/pages.py): the kernel drops its pages
# when somebody needs the room.
IN_FILE = 256 << 20
# Entries of a table are filled up to a multiple of so many; then it is another than the checkpoint's.
PADDED = 64
MAX_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One of a checkpoint's, by its header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int

    @property
    def is_matrix(self) -> bool:
        """Of a linear layer in floating point, the output layer included."""
        return len(self.shape) == 2 and self.kind in FLOATS and self.name.endswith(".weight") and not self.is_table

    @property
    def is_table(self) -> bool:
        return self.name.endswith(("embed_tokens.weight", "wte.weight"))

    @property
    def fits_in_file(self) -> bool:
        """Whether the fused step looks a table up in a file: a large one that is read as it is."""
        return self.size >= IN_FILE and self.kind == "BF16" and self.shape[0] % PADDED == 0

    @property
    def is_head(self) -> bool:
        return self.name == "lm_head.weight"


def tensors(folder: Path) -> Iterator[Tensor]:
    """All of a checkpoint's, in the order of its files; none where it is not on this disk yet."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = _header(file)
            read = [
                Tensor(name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, struct.error):  # whoever loads it says what is wrong
            read = [Tensor("", "", (), file.stat().st_size)]
        yield from read


def weights(folder: Path, cpu_weights: str = "auto", fused: bool = False) -> int:
    """Bytes of memory that a checkpoint's weights take once they are loaded; there is one copy of them.

    `fused`: they are loaded for the fused step.
    """
    bits = BITS.get(cpu_weights)
    size = 0.0
    table = None
    has_head = False
    for tensor in tensors(folder):
        has_head |= tensor.is_head
        table = tensor if tensor.is_table else table
        if bits is not None and tensor.is_matrix:
            size += tensor.shape[0] * tensor.shape[1] * (HEAD_BITS if tensor.is_head else bits) / 8
        else:
            size += tensor.size
    if fused and table is not None and table.fits_in_file and (has_head or bits is not None):
        size -= table.size
    if bits is not None and table is not None and not has_head:
        # The embedding is also the output layer: it is looked up in bfloat16, and multiplied in 8 bits.
        size += table.shape[0] * table.shape[1] * HEAD_BITS / 8
    return int(size)


def slots(folder: Path, adapters: int, rank: int) -> int:
    """Bytes that so many adapters of this rank on all linear layers take in a batch.

    Those of the embedding and the output layer take memory only where an adapter has them.
    """
    quantization = _quantization(folder)
    return 2 * rank * adapters * sum(_sides(tensor, quantization) for tensor in tensors(folder))


def _sides(tensor: Tensor, quantization: Mapping[str, Any]) -> int:
    """Inputs and outputs of a linear layer together; 0 for another tensor."""
    last = tensor.name.rpartition(".")[2]
    if len(tensor.shape) != 2 or tensor.is_table or tensor.is_head:
        return 0
    if last == "weight" and quantization.get("quant_method") == METHOD and tensor.kind == "U8":
        kind = quantization["types"][tensor.name.removesuffix(".weight")]
        return tensor.shape[0] + inputs_of(kind, tensor.shape[1])
    if last == "weight":
        return sum(tensor.shape)
    if last not in ("weight_packed", "qweight"):
        return 0
    # 32 bits hold several inputs, in AWQ several outputs; GPTQ has the inputs first.
    first, second = tensor.shape
    many = 32 // int(quantization.get("bits") or _num_bits(quantization))
    gptq = last == "qweight" and quantization.get("quant_method") != "awq"
    return many * first + second if gptq else first + many * second


def _num_bits(quantization: Mapping[str, Any]) -> int:
    groups = quantization.get("config_groups") or {}
    return next((int(group["weights"]["num_bits"]) for group in groups.values()), 4)


def _quantization(folder: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})
    except (OSError, ValueError):
        return {}


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if not 0 < length <= MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        return dict(json.loads(opened.read(length)))
