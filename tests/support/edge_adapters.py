"""LoRA adapters of the embedding or of the output layer alone, with random weights that move every token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.lora import CONFIG, WEIGHTS, write_tensors
from tests.support.server import BASE

HIDDEN, VOCABULARY, RANK = 576, 49152, 4
EMBEDDING, HEAD = "embed_tokens", "lm_head"


def edge_adapter(folder: Path, seed: int, module: str = HEAD) -> Path:
    """module: EMBEDDING or HEAD of the embedded model."""
    dice = np.random.default_rng(seed)
    if module == HEAD:
        a, b = (dice.standard_normal(shape, np.float32) for shape in ((RANK, HIDDEN), (VOCABULARY, RANK)))
        a /= 24
        names = [f"base_model.model.lm_head.lora_{half}.weight" for half in "AB"]
    else:
        a, b = (dice.standard_normal(shape, np.float32) for shape in ((RANK, VOCABULARY), (HIDDEN, RANK)))
        b /= 24
        names = [f"base_model.model.model.embed_tokens.lora_embedding_{half}" for half in "AB"]
    folder.mkdir(parents=True)
    write_tensors(folder / WEIGHTS, dict(zip(names, (a, b), strict=True)))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [module]}
    (folder / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": BASE}))
    return folder
