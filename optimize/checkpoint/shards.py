"""A checkpoint's weights in files of at most so many bytes; bytes are copied as they are, without torch."""

from __future__ import annotations

import json
from pathlib import Path

from optimize.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, Entry, write_shard


def limited(folder: Path, largest: int) -> None:
    """Write the checkpoint in `folder` again where a file of it is larger than `largest`; a tensor stays whole."""
    checkpoint = Checkpoint(folder)
    old = [folder / name for name in checkpoint.files]
    if all(file.stat().st_size <= largest for file in old):
        return
    shards = _shared_out(checkpoint, largest)
    weight_map: dict[str, str] = {}
    made: list[tuple[Path, Path]] = []
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        aside = folder / f"{name}.part"
        write_shard(aside, folder, {tensor: checkpoint.entries[tensor] for tensor in names})
        made.append((aside, folder / name))
        weight_map |= dict.fromkeys(names, name)
    for file in old:
        file.unlink()
    for aside, file in made:
        aside.rename(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": checkpoint.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shared_out(checkpoint: Checkpoint, largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = largest
    for name, entry in checkpoint.entries.items():
        needs = entry.bytes + _header_bytes(name, entry)
        if shards[-1] and needs > room:
            shards.append([])
            room = largest
        shards[-1].append(name)
        room -= needs
    return shards


def _header_bytes(name: str, entry: Entry) -> int:
    described = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [10**12, 10**12]}
    return len(json.dumps({name: described})) + 2
