"""A GGUF file's checkpoint, written: config, tokenizer, template, weights as they are there, or in bfloat16.

    config and names > tokenizer > each tensor: dequantize, put back, round to bfloat16, write; or its bytes as they are

`python -m serve.models.gguf.conversion FILE FOLDER FORM` does it in a process of its own, since numpy begins threads,
and a server forks its engines: tenths on stdout, a sentence on stderr.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import ConfigError
from serve.models.gguf import tokenizer
from serve.models.gguf.checkpoint import NOTE, REFUSED, Form, parts_of
from serve.models.gguf.families import Plan, plan, values
from serve.models.gguf.file import GGUF, Tensor
from serve.models.gguf.kept import BLOCKS, METHOD, SCALES, kept_types
from serve.models.gguf.names import original_name

AT_ONCE = 1 << 22  # weights that are turned at a time
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def convert(path: Path, folder: Path, form: Form, progress: Callable[[float], None]) -> None:
    """Write the checkpoint into this empty folder. progress: is told the share that is done."""
    file = GGUF.open(path)
    intended = plan(file)
    types = kept_types(intended.names, file.tensors) if form is Form.KEPT else {}
    if types:
        tied = bool(intended.config["tie_word_embeddings"])
        intended.config["quantization_config"] = {"quant_method": METHOD, "types": types, "tied": tied}
    tokenizer.save(file, folder)
    # Without it transformers takes a tokenizer for one of Mistral's whose pattern was wrong, and says so.
    intended.config["transformers_version"] = version("transformers")
    _write(folder / "config.json", intended.config)
    _write(folder / "generation_config.json", _generation(file))
    _weights(file, intended, {f"{module}.weight" for module in types}, folder / "model.safetensors", progress)
    kinds = Counter(tensor.type for tensor in file.tensors.values())
    note = {
        "path": str(path.resolve()),
        "file": str(path.absolute()),
        "form": form,
        "types": dict(kinds.most_common()),
        "names": _names(file),
    }
    _write(folder / NOTE, note | {"sha256": _sha256(parts_of(path))})


def _weights(file: GGUF, intended: Plan, kept: Set[str], path: Path, progress: Callable[[float], None]) -> None:
    """Each tensor after the other, some rows at a time; those that are kept as rows of bytes.

    The format: github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for source, name in intended.names.items():
        tensor = file.tensors[source]
        if name in kept:
            end = at + tensor.nbytes
            header[name] = {"dtype": "U8", "shape": [tensor.shape[0], tensor.nbytes // tensor.shape[0]]}
        else:
            end = at + 2 * tensor.weights
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [at, end]
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    total, done = at, 0
    said = 0.0
    with path.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for source, name in intended.names.items():
            for piece in _bytes(intended, file.tensors[source], name in kept):
                out.write(piece)
                done += len(piece)
                if done / total >= said + 0.1:
                    said = done / total
                    progress(said)


def _bytes(intended: Plan, tensor: Tensor, kept: bool) -> Iterator[bytes]:
    """A tensor's, piece by piece. ConfigError: it has a number that is not finite."""
    if kept:
        yield intended.rows_back(tensor.name, _rows(tensor)).tobytes()
        return
    for first, rows in _pieces(intended, tensor):
        read = intended.put_back(tensor, values(tensor, first, rows))
        if not np.isfinite(read).all():
            raise ConfigError(f"tensor {tensor.name!r} of {tensor.path.name} has numbers that are not finite")
        yield rounded(read).tobytes()


def _rows(tensor: Tensor) -> NDArray[np.uint8]:
    """(outputs, bytes) as they are in the file. ConfigError: a scale is not finite."""
    raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.begin)
    blocks = raw.reshape(-1, BLOCKS[tensor.type][1])
    for at in SCALES[tensor.type]:
        if not np.isfinite(np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)).all():
            raise ConfigError(f"tensor {tensor.name!r} of {tensor.path.name} has numbers that are not finite")
    return raw.reshape(tensor.shape[0], -1)


def _pieces(intended: Plan, tensor: Tensor) -> list[tuple[int, int]]:
    """First row and how many; a matrix whose rows change places is one piece."""
    shape = tensor.shape
    if len(shape) == 1 or (intended.family.turned and ".attn_" in tensor.name):
        return [(0, shape[0])]
    each = max(1, AT_ONCE // shape[1])
    return [(first, min(each, shape[0] - first)) for first in range(0, shape[0], each)]


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even, as its bits."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _generation(file: GGUF) -> dict[str, Any]:
    ends = tokenizer.ends(file)
    made: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    for key, option in SAMPLING.items():
        value = file.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            made |= {option: round(value, 6), "do_sample": True}
    return made


def _names(file: GGUF) -> list[str]:
    """By which the model is known, so that adapters of the original checkpoint are taken for it."""
    found = [original_name(file.path.name)]
    said = [file.metadata.get(f"general.{key}") for key in ("basename", "size_label", "finetune")]
    found.append("-".join(part for part in said if isinstance(part, str) and part))
    keys = ("general.name", "general.source.huggingface.repository", "general.base_model.0.repo_url")
    found += [
        value.removeprefix("https://huggingface.co/")
        for key in keys
        if isinstance(value := file.metadata.get(key), str)
    ]
    return [name for name in dict.fromkeys(found) if name]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main(path: str, folder: str, form: str) -> int:
    try:
        convert(Path(path), Path(folder), Form(form), lambda share: print(f"{share:.0%}", flush=True))
    except ConfigError as refused:
        print(refused.message, file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return error.errno or 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
