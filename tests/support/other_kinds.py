"""A LoRA over the embedded model as an adapter of another kind that says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.lora import CONFIG, WEIGHTS, read_tensors, write_tensors

PREFIX = "base_model.model."
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
# Of " the" and " of", and of what the base does not have.
COMMON, ADDED = (260, 282), ("<call>", "ACME-7")


@cache
def _base() -> Any:
    from safetensors import safe_open

    from serve.models.embedded import ensure

    return safe_open(ensure("smollm2") / "model.safetensors", "pt")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((folder / CONFIG).read_text()), read_tensors(folder / WEIGHTS)


def _written(out: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str = "F32") -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_tensors(out / WEIGHTS, tensors, dtype)
    (out / CONFIG).write_text(json.dumps(settings))
    return out


def _pairs(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each module's name, A, and B times its scaling."""
    scaling = np.float32(settings["lora_alpha"] / settings["r"])
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            yield stem.removeprefix(PREFIX), tensors[name], scaling * tensors[f"{stem}.lora_B.weight"]


def as_dora(folder: Path, out: Path, noise: float = 0.01) -> Path:
    """With magnitudes that are about so much off the norms."""
    settings, tensors = _read(folder)
    dice = np.random.default_rng(0)
    for module, a, b in list(_pairs(settings, tensors)):
        weight = _base().get_tensor(f"{module}.weight").float().numpy()
        norms = np.linalg.norm(weight + b @ a, axis=1)
        norms *= 1 + noise * dice.standard_normal(len(norms)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = norms
    return _written(out, {**settings, "use_dora": True}, tensors)


def with_tokens(folder: Path, out: Path, noise: float = 0.1) -> Path:
    """With rows of its own, so much off the base's, for two common tokens and for two new ones, and their tokenizer."""
    settings, tensors = _read(folder)
    table = _base().get_slice("model.embed_tokens.weight")
    count, width = table.get_shape()
    rows = np.concatenate([table[number : number + 1].float().numpy() for number in (*COMMON, *COMMON)])
    rows += noise * rows.std() * np.random.default_rng(0).standard_normal((len(rows), width))
    tensors[ROWS] = rows.astype(np.float32)
    numbers = range(count, count + len(ADDED))
    settings["trainable_token_indices"] = [*COMMON, *numbers]
    tokens = [{"id": number, "content": word, "special": True} for number, word in zip(numbers, ADDED, strict=True)]
    _written(out, settings, tensors)
    (out / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": tokens}))
    return out


def as_loha(folder: Path, out: Path) -> Path:
    """The element-wise product of its update and of ones."""
    settings, tensors = _read(folder)
    factors = {}
    for module, a, b in _pairs(settings, tensors):
        ones = [np.zeros_like(b), np.zeros_like(a)]
        ones[0][:, 0] = ones[1][0] = 1
        for name, pair in (("w1", (b, a)), ("w2", ones)):
            factors |= {f"{PREFIX}{module}.hada_{name}_{half}": pair["ab".index(half)] for half in "ab"}
    loha = {"peft_type": "LOHA", "r": settings["r"], "alpha": settings["r"]}
    kept = {key: settings[key] for key in ("target_modules", "base_model_name_or_path")}
    return _written(out, {**loha, **kept}, factors, "BF16")
