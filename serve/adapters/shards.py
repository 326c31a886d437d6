"""Weights that came in several files, or under the names that PEFT uses inside, become the one file that is kept.

adapter_model-00001-of-00002.safetensors, ...     joined, in their order
...lora_A.default.weight                          ...lora_A.weight
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serve.adapters.adapter import WEIGHTS
from serve.adapters.file_thread import rest
from serve.adapters.tensors import Tensor, read_header
from serve.adapters.untrusted import create, open_plain, write
from serve.errors import AdapterRejected
from serve.names import shown

INDEX = f"{WEIGHTS}.index.json"
MAX_SHARDS = 64

_SHARD = re.compile(r"adapter_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INNER_NAME = re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B))\.default(\.weight)?$")
_CHUNK = 1 << 20


def is_shard(name: str) -> bool:
    """By its name, one of several files of weights."""
    return _SHARD.fullmatch(name) is not None


def join(folder: Path, take: Callable[[int], None] = lambda nbytes: None) -> None:
    """Leave one plain WEIGHTS in `folder`, if it has weights; what is wrong with a single file is left to `inspect`.

    `take(nbytes)` hears of bytes that are about to be written, and may refuse them.
    """
    shards = sorted(path for path in folder.iterdir() if is_shard(path.name))
    whole = folder / WEIGHTS
    if not shards:
        if whole.exists() and _has_inner_names(whole):
            _rewrite([whole], folder, take)
        return
    if whole.exists():
        raise AdapterRejected(f"there is {WEIGHTS} and also {shards[0].name}; send one of the two")
    _check_complete([path.name for path in shards])
    _rewrite(shards, folder, take)


def names_in(index: bytes) -> list[str]:
    """The files that a shard index names."""
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as odd:
        raise AdapterRejected(f"{INDEX} is not a shard index; save the adapter again") from odd
    if not names:
        raise AdapterRejected(f"{INDEX} names no file; save the adapter again")
    if odd_names := [name for name in names if not isinstance(name, str) or not is_shard(name)]:
        raise AdapterRejected(f"{INDEX} names `{shown(odd_names[0])}`, which is no adapter_model-NNNNN-of-NNNNN file")
    _check_complete(names)
    return names


def _check_complete(names: Sequence[str]) -> None:
    count = int(_SHARD.fullmatch(names[0])["count"])  # type: ignore[index]
    if count > MAX_SHARDS:
        raise AdapterRejected(f"the weights are in {count} files; this server takes up to {MAX_SHARDS}")
    wanted = [f"adapter_model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if missing := sorted(set(wanted) - set(names)):
        raise AdapterRejected(f"{missing[0]} is missing: the weights are in {count} files; send all of them")
    if stray := sorted(set(names) - set(wanted)):
        raise AdapterRejected(f"{stray[0]} belongs to another set of files than {wanted[0]}; send one set")


def _has_inner_names(path: Path) -> bool:
    try:
        with open_plain(path) as file:
            return any(_INNER_NAME.search(tensor.name) for tensor in read_header(file))
    except AdapterRejected:
        return False


def _rewrite(parts: Sequence[Path], folder: Path, take: Callable[[int], None]) -> None:
    """One safetensors file out of `parts`, which are removed; only its header is new."""
    joined = folder / f"{WEIGHTS}.joined"
    with ExitStack() as stack:
        files = [stack.enter_context(open_plain(path)) for path in parts]
        headers = [read_header(file, path.name) for file, path in zip(files, parts, strict=True)]
        out = stack.enter_context(create(joined))
        write(out, _header([tensor for header in headers for tensor in header]))
        for file, header in zip(files, headers, strict=True):
            if header:
                file.seek(header[0].start)  # a file's tensors fill it to its end
                while data := file.read(_CHUNK):
                    rest()
                    take(len(data))
                    write(out, data)
    for path in parts:
        path.unlink()
    os.rename(joined, folder / WEIGHTS)


def _header(tensors: Sequence[Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    at = 0
    for tensor in tensors:
        name = _INNER_NAME.sub(r".\1\2", tensor.name)
        if name in entries:
            raise AdapterRejected(f"`{shown(name)}` is there twice; save the adapter again")
        end = at + tensor.end - tensor.start
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
