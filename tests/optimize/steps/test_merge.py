"""A merged model says what base + adapter says, through PEFT, which is another's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import OptimizeError, Refused
from optimize.steps.merge import merge
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(2, 16)

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks and alphas of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 20}},
    "another output layer": {"modules_to_save": ["lm_head"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "norms of the layers": {"modules_to_save": ["input_layernorm"]},
    "a matrix of each layer": {"modules_to_save": ["o_proj"]},
}


def both(base: Path, folder: Path) -> torch.Tensor:
    with adapted(opened(base, torch.float32), folder) as model:
        return logits(model, IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_plus_adapter(kind, base, adapter, job):
    folder = adapter(**KINDS[kind])
    right, plain = both(base, folder), logits(opened(base, torch.float32), IDS)
    assert (right - plain).abs().max() > 0.1
    made = job("merge", adapters={"one": folder}, names=["one"])
    notes = merge.run(made, silent)
    now = logits(opened(made.folder / "model", torch.float32), IDS)
    # The rest is the rounding of weights to bf16, once.
    assert (now - right).abs().max() < 0.04 * (right - plain).abs().max() + 0.02
    assert notes["kl_to_base_plus_adapter"] < 1e-3
    assert notes["weights_off_in_last_places"] <= 0.51


def test_an_adapter_of_one_side_of_a_tied_pair_unties_it(base, adapter, job):
    assert Checkpoint(base).tied
    made = job("merge", adapters={"one": adapter(modules_to_save=["lm_head"])}, names=["one"])
    merge.run(made, silent)
    merged = Checkpoint(made.folder / "model")
    assert merged.config["tie_word_embeddings"] is False
    assert not torch.equal(merged.tensor("lm_head.weight"), merged.tensor("model.embed_tokens.weight"))


def test_two_in_a_row_add_up_and_a_weight_scales(base, adapter, tmp_path):
    one, two = merge.read("one", adapter(seed=1)), merge.read("two", adapter(seed=2), -0.5)
    merge.merged_into(base, [one, two], tmp_path / "m", silent)
    name = "model.layers.1.mlp.up_proj"
    before, after = (Checkpoint(folder).tensor(f"{name}.weight").float() for folder in (base, tmp_path / "m"))
    exact = before + 2 * one.lora[name]["B"] @ one.lora[name]["A"] - two.lora[name]["B"] @ two.lora[name]["A"]
    assert torch.equal(after, exact.bfloat16().float())


def test_shards_stay_small_and_hold_the_same(base, adapter, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    one = merge.read("one", adapter())
    merge.merged_into(base, [one], whole, silent)
    merge.merged_into(base, [one], pieces, silent, shard_bytes=40_000)
    assert len(Checkpoint(pieces).files) > 3
    assert max((pieces / file).stat().st_size for file in Checkpoint(pieces).files) < 45_000
    for name in Checkpoint(whole).entries:
        assert torch.equal(Checkpoint(whole).tensor(name), Checkpoint(pieces).tensor(name))


def test_what_cannot_be_merged_is_said(base, adapter, tmp_path):
    folder = adapter()
    broken = merge.read("one", folder)
    next(iter(broken.lora.values()))["A"][0] = torch.nan
    with pytest.raises(OptimizeError, match="NaN or infinity in model.layers"):
        merge.merged_into(base, [broken], tmp_path / "nan", silent)
    other = merge.read("one", folder)
    other.lora["model.layers.9.mlp.up_proj"] = other.lora["model.layers.0.mlp.up_proj"]
    with pytest.raises(Refused, match="another base: this one has no model.layers.9"):
        merge.merged_into(base, [other], tmp_path / "other", silent)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
