"""The stacked files of a mixture do what the weighted sum of its parts does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.adapter import CONFIG, WEIGHTS, Limits
from serve.adapters.inspection import inspect
from serve.adapters.mixing.stacking import stack
from serve.errors import AdapterRejected

MODULES = {
    "model.layers.0.q_proj": (16, 16),
    "model.layers.0.down_proj": (16, 32),
    "model.layers.1.q_proj": (16, 16),
    "model.embed_tokens": (16, 40),
}
RANKS = {"q_proj": 4, "down_proj": 2, "embed_tokens": 4}


def part(folder: Path, seed: int, dtype: torch.dtype = torch.float32, targets: Any = ("q_proj", "down_proj"),
         **settings: Any) -> Path:  # fmt: skip
    folder.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in MODULES.items():
        last = name.rpartition(".")[2]
        if last in targets:
            rank = RANKS[last]
            a, b = (
                ("lora_embedding_A", "lora_embedding_B")
                if last == "embed_tokens"
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"base_model.model.{name}.{a}"] = torch.randn(rank, into, generator=draw).to(dtype)
            tensors[f"base_model.model.{name}.{b}"] = torch.randn(out, rank, generator=draw).to(dtype)
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "rank_pattern": {"down_proj": 2},
        **settings,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def products(folder: Path, scale: dict[str, float]) -> dict[str, torch.Tensor]:
    """Module -> what is added to its weight."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    added = {}
    for name in MODULES:
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if (left := tensors.get(f"base_model.model.{name}.{b}")) is not None:
                last = name.rpartition(".")[2]
                added[name] = scale.get(last, scale[""]) * left @ tensors[f"base_model.model.{name}.{a}"]
    return added


def test_a_weighted_sum_is_exact_with_every_kind_of_scaling(tmp_path: Path) -> None:
    tone = part(tmp_path / "tone", 0, alpha_pattern={"down_proj": 3})
    legal = part(tmp_path / "legal", 1, use_rslora=True, targets=("q_proj", "embed_tokens"))
    into = tmp_path / "mixture"
    into.mkdir()
    assert stack([(tone, 0.7), (legal, -0.3)], into) == 8
    one, other = products(tone, {"": 2.0, "down_proj": 1.5}), products(legal, {"": 4.0})
    zero = torch.zeros(())
    mixed = products(into, {"": 1.0})
    assert mixed.keys() == MODULES.keys()
    for name, product in mixed.items():
        torch.testing.assert_close(
            product, 0.7 * one.get(name, zero) - 0.3 * other.get(name, zero), atol=1e-5, rtol=1e-5
        )
    assert inspect(into, MODULES, Limits(max_rank=8)).rank == 8


def test_bfloat16_stays_bfloat16_and_lora_a_keeps_its_bits(tmp_path: Path) -> None:
    tone, legal = part(tmp_path / "tone", 0, torch.bfloat16), part(tmp_path / "legal", 1, torch.bfloat16)
    into = tmp_path / "mixture"
    into.mkdir()
    stack([(tone, 0.7), (legal, 0.3)], into)
    name = "base_model.model.model.layers.0.q_proj"
    mixed, own = load_file(into / WEIGHTS), load_file(tone / WEIGHTS)
    assert torch.equal(mixed[f"{name}.lora_A.weight"][:4], own[f"{name}.lora_A.weight"])
    left = mixed[f"{name}.lora_B.weight"]
    assert left.dtype == torch.bfloat16
    # As the engine rounds an adapter's lora_B times its scaling.
    assert torch.equal(left[:, :4], (own[f"{name}.lora_B.weight"].float() * 1.4).bfloat16())


def test_a_dora_adds_up_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="is a DoRA"):
        stack([(part(tmp_path / "tone", 0, use_dora=True), 1.0)], tmp_path)


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    tone = part(tmp_path / "tone", 0, lora_alpha=1e29)
    tensors = load_file(tone / WEIGHTS)
    save_file({name: tensor * 1e12 for name, tensor in tensors.items()}, tone / WEIGHTS)
    into = tmp_path / "mixture"
    into.mkdir()
    with pytest.raises(AdapterRejected, match="not finite"):
        stack([(tone, 90.0)], into)
