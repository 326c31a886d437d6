"""Adapters of every PEFT kind over a small Llama with random weights, made by PEFT's own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN = 32
TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPT = torch.tensor([[1, 5, 9, 2, 30, 17], [3, 3, 8, 21, 6, 11]])
KINDS: dict[str, Any] = {
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=4, decompose_factor=4, target_modules=TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=40, target_modules=TARGETS),
    "C3A": lambda: peft.C3AConfig(block_size=16, target_modules=TARGETS),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
}


def base() -> Any:
    """The same model each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def modules(model: Any) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features), as `inspect` takes it."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def trained(model: Any, config: Any, folder: Path, seed: int, scale: float = 0.2) -> Any:
    """PEFT's model of an adapter with random values, as if it were trained, which is saved in `folder`."""
    adapted = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            drawn = torch.randn(parameter.shape, generator=draw)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * drawn)
            else:
                parameter.copy_(scale * drawn)
    adapted.save_pretrained(folder)
    return adapted.eval()


def saved(model: Any, config: Any, folder: Path, seed: int = 1) -> torch.Tensor:
    """An adapter with random values, as if it were trained, in `folder`; PEFT's logits with it."""
    return logits(trained(copy.deepcopy(model), config, folder, seed, scale=0.3))


def loaded(model: Any, folder: Path) -> torch.Tensor:
    """PEFT's logits with the adapter that is in the folder."""
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(PROMPT).logits
    return result
