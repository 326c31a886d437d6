"""A Hugging Face checkpoint on disk: its config, its tensors one at a time, and a writer that keeps shards small.

Nothing here holds a whole model: tensors are mapped from their files, and written as they come. What the
plan needs (names, shapes, bytes) comes from the files' headers, without torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from optimize.checkpoint.architectures import as_vllm_reads
from optimize.errors import Refused

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Tensors of a quantized layer, by their last names.
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
QUANTIZED = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("weight_global_scale", "input_global_scale", *GPTQ, "k_scale", "v_scale"),
)

CHUNK = 16 << 20
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its file's header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int = 0  # where its bytes begin in the file

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return self.bytes // max(1, self.elements)


class Checkpoint:
    """A directory with config.json and safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise Refused(f"{folder} is no model: it has no config.json; name a Hugging Face checkpoint directory")
        if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
            raise Refused(f"{folder} has no safetensors weights; save the model with safe_serialization and try again")

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            read: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            raise Refused(f"{self.folder / 'config.json'} is not JSON: {error}") from error
        return read

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """name -> where and what, over all shards."""
        entries: dict[str, Entry] = {}
        for file in self.files:
            entries |= {name: entry for name, entry in header(self.folder / file).items()}
        return entries

    @cached_property
    def files(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return [SINGLE]
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(f"{index} does not say which file has which weight ({error!r}): fetch it again") from error
        if missing := [name for name in files if not (self.folder / name).is_file()]:
            raise Refused(
                f"{self.folder} lacks {missing[0]}, one of the {len(files)} files that its {INDEX} names: fetch the "
                "model again"
            )
        return files

    @property
    def quantization(self) -> dict[str, Any] | None:
        config: dict[str, Any] | None = self.config.get("quantization_config")
        return config

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every weight, by the names and shapes that it has in a model that was never quantized."""
        scheme = Schemes(self.quantization)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in self.entries.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                shapes[f"{module}.weight"] = (entry.shape[1], entry.shape[0] * 8)
            elif leaf == "weight_packed":
                bits = int((scheme.of(module) or {"weights": {"num_bits": 4}})["weights"]["num_bits"])
                shapes[f"{module}.weight"] = (
                    entry.shape[0],
                    entry.shape[1] * 8 * (entry.bytes // entry.elements) // bits,
                )
            elif leaf not in QUANTIZED:
                shapes[name] = entry.shape
        return shapes

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding itself: some configs leave that to their class."""
        return self.config.get("tie_word_embeddings") is not False and "lm_head.weight" not in self.entries

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def parameters(self) -> int:
        return sum(entry.elements for entry in self.entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor mapped from its file: its pages are read when they are touched. On a GPU a copy, where steps compute
        there."""
        import torch

        mapped: torch.Tensor = self._opened(self.entries[name].file).get_tensor(name)
        return mapped.to(torch.get_default_device())

    def _opened(self, file: str) -> Any:
        from safetensors import safe_open

        if not hasattr(self, "_handles"):
            self._handles: dict[str, Any] = {}
        if file not in self._handles:
            self._handles[file] = safe_open(str(self.folder / file), "pt")
        return self._handles[file]


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors, where the step computes."""
    import torch
    from safetensors.torch import load_file

    device = torch.get_default_device()
    return {name: tensor.to(device) for name, tensor in load_file(folder / ADAPTER).items()}


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    # Its `save_file` makes a file for its owner alone.
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    (folder / ADAPTER).write_bytes(save(whole, {"format": "pt"}))


class Schemes:
    """What a checkpoint's `quantization_config` says of each layer."""

    def __init__(self, config: dict[str, Any] | None) -> None:
        self._by_target: dict[str, dict[str, Any]] = {}
        self._ignore: list[str] = []
        self.gptq = False
        self.kv_cache: dict[str, Any] | None = None
        if config is None:
            return
        method = config.get("quant_method")
        # AutoRound packs as GPTQ does, and says so.
        rounded = method == "auto-round" and config.get("packing_format") == "auto_round:auto_gptq"
        self.gptq = method == "gptq" or rounded
        if self.gptq and (config.get("bits"), config.get("checkpoint_format", "gptq")) != (4, "gptq"):
            raise Refused("GPTQ is read with 4 bits, in the format `gptq`: start from the original")
        if self.gptq:
            return
        if method != "compressed-tensors":
            how = f"{method!r}" + (f" and packed as {config['packing_format']!r}" if "packing_format" in config else "")
            raise Refused(f"the model is quantized as {how}, which is not read here: start from its original")
        self._ignore = list(config.get("ignore") or [])
        self.kv_cache = config.get("kv_cache_scheme")
        for group in config["config_groups"].values():
            for target in group["targets"]:
                self._by_target[target] = group

    def of(self, name: str) -> dict[str, Any] | None:
        """The layer's group: by its name, by a regular expression, or as a linear layer, in this order."""
        if any(_names(pattern, name) for pattern in self._ignore):
            return None
        by_pattern = (group for pattern, group in self._by_target.items() if _names(pattern, name))
        return self._by_target.get(name) or next(by_pattern, None) or self._by_target.get("Linear")

    def rounds_activations(self, name: str) -> bool:
        group = self.of(name)
        return bool(group and group.get("input_activations"))


def _names(pattern: str, name: str) -> bool:
    """Whether a target of compressed-tensors is this layer."""
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


class Writer:
    """A new checkpoint in `folder`: `add` tensors, then `close` with the config; side files come from `like`.

    Each tensor is written as it comes, and memory holds none of them. A writer that is given the `mark` of an earlier
    one goes on from there, whatever that one wrote after it.
    """

    def __init__(
        self, folder: Path, like: Path, shard_bytes: int = 4_000_000_000, mark: list[dict[str, Any]] | None = None
    ) -> None:
        self.folder = folder
        self.like = like
        self.shard_bytes = shard_bytes
        self._shards: list[dict[str, Entry]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for shard in mark or []:
            self._shards.append({name: Entry(**entry) for name, entry in shard.items()})
            part = folder / _part(len(self._shards))
            if part.exists():  # else `close` got as far as this shard, and nothing comes after the mark
                os.truncate(part, _bytes(self._shards[-1]))
        (folder / _part(len(self._shards) + 1)).unlink(missing_ok=True)

    @property
    def mark(self) -> list[dict[str, Any]]:
        """What is written by now, and on the disk."""
        for number in range(1, len(self._shards) + 1):
            if not (self.folder / _part(number)).exists():
                continue
            with (self.folder / _part(number)).open("rb") as part:
                os.fsync(part.fileno())
        return [{name: asdict(entry) for name, entry in shard.items()} for shard in self._shards]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        size = tensor.numel() * tensor.element_size()
        if not self._shards or _bytes(self._shards[-1]) + size > self.shard_bytes:
            self._shards.append({})
            (self.folder / _part(len(self._shards))).unlink(missing_ok=True)
        shard, file = self._shards[-1], _part(len(self._shards))
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        shard[name] = Entry(file, dtype, tuple(tensor.shape), size, _bytes(shard))
        with (self.folder / file).open("ab") as out:
            out.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)

    def close(self, config: dict[str, Any]) -> None:
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            part = self.folder / _part(number)
            if part.exists():
                write_shard(self.folder / file, self.folder, shard)
                part.unlink()
            weight_map |= dict.fromkeys(shard, file)
        if count > 1:
            total = sum(map(_bytes, self._shards))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (self.folder / "config.json").write_text(json.dumps(as_vllm_reads(config), indent=2) + "\n")
        copy_side_files(self.like, self.folder)


def _part(number: int) -> str:
    """The bytes of a shard that is not whole yet."""
    return f"shard-{number}.part"


def _bytes(shard: Mapping[str, Entry]) -> int:
    return sum(entry.bytes for entry in shard.values())


def write_shard(file: Path, folder: Path, entries: Mapping[str, Entry]) -> None:
    """A safetensors file of tensors whose bytes lie in files of `folder`; nothing is held in memory.

    Wider numbers come first, so that each tensor begins where its numbers may.
    """
    names = sorted(entries, key=lambda name: (-entries[name].width, name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        end = begin + entries[name].bytes
        described[name] = {
            "dtype": entries[name].dtype, "shape": list(entries[name].shape), "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    head = json.dumps(described, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            _copy(folder / entries[name].file, entries[name], out)


def _copy(source: Path, entry: Entry, out: BinaryIO) -> None:
    with source.open("rb") as read:
        read.seek(entry.start)
        left = entry.bytes
        while left:
            if not (chunk := read.read(min(CHUNK, left))):
                raise Refused(f"{source} was cut short: make or fetch it again")
            left -= out.write(chunk)


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation config and whatever else lies beside the weights, but a model card."""
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".gguf") or file.name == INDEX
        ours = file.name in ("config.json", "README.md", "manifest.json")
        if file.is_file() and not weights and not ours and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in a PEFT folder."""
    read = json.loads((folder / ADAPTER_CONFIG).read_text())
    if not isinstance(read, dict):
        raise ValueError("it is no JSON object")
    return read


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, from its header alone. Refused: it is none, or not all of it is there."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100 << 20:
                raise ValueError("its header has no sensible length")
            read = json.loads(file.read(length))
            data = os.fstat(file.fileno()).st_size - 8 - length
        read.pop("__metadata__", None)
        entries = {
            name: Entry(path.name, item["dtype"], tuple(item["shape"]), end - begin, 8 + length + begin)
            for name, item in read.items()
            for begin, end in [item["data_offsets"]]
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is no safetensors file: {error}") from error
    whole = max((entry.start + entry.bytes for entry in entries.values()), default=8 + length)
    if whole - 8 - length > data:
        there = 8 + length + data
        raise Refused(
            f"{path} has {there} of the {whole} bytes that its header names: it was cut short, fetch it again"
        )
    return entries
