"""A tiny model and adapters for it: files with the right names and shapes, and nothing trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HIDDEN, LAYERS, VOCABULARY = 16, 2, 32


def model(folder: Path) -> Path:
    """A model directory with a configuration and no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, seed: int = 0, rank: int = 2) -> Path:
    """A PEFT folder for `model`; another seed gives other bytes."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def untrained(folder: Path) -> Path:
    """The same adapter as PEFT begins: every lora_B is zero, so it changes nothing."""
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor * (".lora_B." not in name) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    return folder
