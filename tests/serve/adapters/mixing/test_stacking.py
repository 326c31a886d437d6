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
from serve.adapters.mixing.pruning import Pruning
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


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_what_peft_makes_of_the_updates(tmp_path: Path, density: float) -> None:
    from peft.utils import merge_utils

    tone, legal = part(tmp_path / "tone", 0), part(tmp_path / "legal", 1, use_rslora=True, targets=("q_proj",))
    into = tmp_path / "mixture"
    into.mkdir()
    assert stack([(tone, 0.7), (legal, -0.3)], into, Pruning("ties", density, ("a", "b"), 16)) == 16
    one, other = products(tone, {"": 2.0, "down_proj": 4.0}), products(legal, {"": 4.0})
    mixed = products(into, {"": 1.0})
    assert mixed.keys() == one.keys()
    for name, product in mixed.items():
        updates = [(each[name], weight) for each, weight in ((one, 0.7), (other, -0.3)) if name in each]
        weights = torch.tensor([weight for _, weight in updates], dtype=torch.float64)
        expected = merge_utils.ties([update for update, _ in updates], weights, density)
        torch.testing.assert_close(product, expected, atol=1e-4, rtol=1e-4)


def test_dare_drops_what_the_digests_say_and_means_the_sum(tmp_path: Path) -> None:
    tone, legal = part(tmp_path / "tone", 0), part(tmp_path / "legal", 1)

    def mixed(digests: tuple[str, str], method: str = "dare_linear") -> dict[str, torch.Tensor]:
        into = tmp_path / f"{method}-{'-'.join(digests)}"
        into.mkdir(exist_ok=True)
        for file in into.iterdir():
            file.unlink()
        stack([(tone, 1.0), (legal, 0.5)], into, Pruning(method, 0.5, digests, 16))
        return products(into, {"": 1.0})

    name = "model.layers.0.down_proj"
    first = mixed(("a", "b"))[name]
    assert torch.equal(first, mixed(("a", "b"))[name]), "the same adapters, the same mixture"
    assert not torch.equal(first, mixed(("a", "c"))[name])
    assert not torch.equal(first, mixed(("a", "b"), "dare_ties")[name])
    assert 0.15 < (first == 0).double().mean() < 0.35, "a quarter is dropped of both"
    scale = {"": 2.0, "down_proj": 4.0}
    whole = products(tone, scale)[name] + 0.5 * products(legal, scale)[name]
    mean = sum(mixed((f"{draw}", f"{draw}x"))[name] for draw in range(60)) / 60
    assert (mean - whole).norm() < 0.25 * whole.norm()


def test_a_pruned_update_needs_the_rank_of_its_matrix(tmp_path: Path) -> None:
    tone, into = part(tmp_path / "tone", 0), tmp_path / "mixture"
    into.mkdir()
    with pytest.raises(AdapterRejected, match=r"rank 16, .* up to 8: a max_lora_rank of 16 would be needed.*optimize"):
        stack([(tone, 1.0)], into, Pruning("ties", 0.5, ("a",), 8))
    assert not list(into.iterdir())


def test_what_its_own_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Numbers of sixteen bits end at 65,504, or go on as far as those of 32."""
    into = tmp_path / "mixture"
    into.mkdir()
    half = part(tmp_path / "half", 0, torch.float16, lora_alpha=4e4)
    with pytest.raises(AdapterRejected, match="not finite numbers any more"):
        stack([(half, 100.0)], into)
    (into / WEIGHTS).unlink()
    assert stack([(part(tmp_path / "wide", 0, torch.bfloat16, lora_alpha=4e4), 100.0)], into) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_are_rounded_once_however_many_alphas_there_are(tmp_path: Path, dtype: torch.dtype) -> None:
    alphas = {"layers.0.q_proj": 3, "layers.0.down_proj": 5, "layers.1.q_proj": 7}
    tone = part(tmp_path / "tone", 0, dtype, alpha_pattern=alphas)
    into = tmp_path / "mixture"
    into.mkdir()
    stack([(tone, -0.3)], into)
    mixed, own = load_file(into / WEIGHTS), load_file(tone / WEIGHTS)
    for module, alpha in alphas.items():
        name = f"base_model.model.model.{module}.lora_B.weight"
        rank = RANKS[module.rpartition(".")[2]]
        factor = torch.tensor(-0.3 * (alpha / rank), dtype=torch.float32)
        assert mixed[name].dtype == dtype
        assert torch.equal(mixed[name][:, :rank], (own[name].float() * factor).to(dtype))
