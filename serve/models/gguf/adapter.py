"""A LoRA in a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it, made into PEFT's two files.

    blk.N.attn_q.weight.lora_a, .lora_b     base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight, ...
    adapter.lora.alpha                      lora_alpha: each product is multiplied by it and divided by its rank

What the converter changed is changed back: in `llama` and `granite` the rows of B, of queries and keys, are in the
order of rotary pairs side by side. No number becomes another.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import ConfigError
from serve.models.gguf.families import FAMILIES, Family, pairs_apart, peft_module
from serve.models.gguf.file import GGUF, Tensor

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_HALF = re.compile(r"(.+\.weight)\.lora_([ab])")
_REPOSITORY = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True, slots=True)
class Pair:
    """What adapts one module: a is (rank, inputs), b is (outputs, rank)."""

    module: str
    turned: bool  # whether b's rows are in another order than the checkpoint's
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def write_peft(path: Path, base: Path, config: Path, weights: Path) -> None:
    """Write PEFT's configuration and tensors of the adapter at `path`. base: the folder of the model that it is for.

    ConfigError: why the adapter cannot be read.
    """
    file = GGUF.open(path)
    family = _family(file)
    pairs = list(_pairs(file, family))
    heads = _heads(base) if any(pair.turned for pair in pairs) else {}
    config.write_text(json.dumps(_config(file, pairs), indent=2))
    tensors = [(pair, half) for pair in pairs for half in "AB"]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for pair, half in tensors:
        tensor = pair.a if half == "A" else pair.b
        entry = {"dtype": tensor.type, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        header[f"base_model.model.{pair.module}.lora_{half}.weight"] = entry
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with weights.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for pair, half in tensors:
            rows = _rows(pair.a if half == "A" else pair.b)
            if half == "B" and pair.turned:
                count = heads["k_proj" if pair.module.endswith("k_proj") else "q_proj"]
                if rows.shape[0] % (2 * count):
                    raise ConfigError(f"tensor {pair.b.name!r} has {rows.shape[0]} rows, and the base {count} heads")
                rows = pairs_apart(rows, count)
            out.write(rows.tobytes())


def _family(file: GGUF) -> Family:
    kind, form = file.metadata.get("general.type", "model"), file.metadata.get("adapter.type", "none")
    if kind != "adapter":
        raise ConfigError(f"{file.path.name} is a {kind}, not an adapter: serve it with `loradock serve`")
    if form != "lora":
        raise ConfigError(f"{file.path.name} is an adapter of the type {form!r}: only lora is taken")
    if any(key.startswith("adapter.alora.") for key in file.metadata):
        raise ConfigError(f"{file.path.name} is an activated LoRA that begins at a token: only plain LoRA is taken")
    name = file.text("general.architecture")
    if name not in FAMILIES:
        raise ConfigError(f"{file.path.name} is for the architecture {name!r}: {', '.join(FAMILIES)} are known here")
    return FAMILIES[name]


def _pairs(file: GGUF, family: Family) -> Iterator[Pair]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        found = _HALF.fullmatch(name)
        if found is None:
            raise ConfigError(f"tensor {name!r} of {file.path.name} is no lora_a or lora_b of a weight")
        if found[1] == "token_embd.weight":
            raise ConfigError(f"{file.path.name} adapts the embedding, which is taken in PEFT's format alone")
        if tensor.type not in FLOATS:
            raise ConfigError(
                f"tensor {name!r} of {file.path.name} is {tensor.type}: convert the adapter with --outtype f32 or bf16"
            )
        halves.setdefault(found[1], {})[found[2]] = tensor
    if not halves:
        raise ConfigError(f"{file.path.name} has no tensor")
    for name, pair in halves.items():
        if len(pair) != 2:
            raise ConfigError(f"{name!r} of {file.path.name} has lora_{next(iter(pair))} alone")
        a, b = pair["a"], pair["b"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ConfigError(
                f"{name!r} of {file.path.name} has the sizes {list(a.shape)} and {list(b.shape)}: of lora_a the first, "
                "and of lora_b the second, is the rank"
            )
        turned = family.turned and name.endswith(("attn_q.weight", "attn_k.weight"))
        yield Pair(peft_module(name, family), turned, a, b)


def _config(file: GGUF, pairs: list[Pair]) -> dict[str, Any]:
    """Of PEFT. An alpha of 0 is llama.cpp's word for none: products are taken as they are."""
    alpha = file.number("adapter.lora.alpha")
    ((rank, _),) = Counter(pair.rank for pair in pairs).most_common(1)
    ranks = {pair.module: pair.rank for pair in pairs if pair.rank != rank}
    repository = file.metadata.get("general.base_model.0.repo_url")
    found = _REPOSITORY.fullmatch(repository) if isinstance(repository, str) else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found[1] if found else None,
        "r": rank,
        "lora_alpha": alpha or rank,
        "rank_pattern": ranks,
        "alpha_pattern": {} if alpha else dict(ranks),
        "target_modules": sorted({pair.module.rpartition(".")[2] for pair in pairs}),
        "bias": "none",
        "inference_mode": True,
    }


def _heads(base: Path) -> dict[str, int]:
    """Of the base, by the last part of the module's name."""
    try:
        config = json.loads((base / "config.json").read_text())
        queries = int(config["num_attention_heads"])
        return {"q_proj": queries, "k_proj": int(config.get("num_key_value_heads") or queries)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the base does not say how many heads it has ({error!r})") from error


def _rows(tensor: Tensor) -> NDArray[Any]:
    kind = np.uint32 if FLOATS[tensor.type] == 4 else np.uint16  # moved, not computed with
    raw = np.fromfile(tensor.path, kind, tensor.weights, offset=tensor.begin)
    return raw.reshape(tensor.shape)
