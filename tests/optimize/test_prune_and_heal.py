"""Pruning leaves the model that a hand would leave, and healing brings some of it back, wherever it is interrupted."""

from __future__ import annotations

import pytest
import torch

from optimize import heal, prune
from optimize.checkpoint import Checkpoint
from optimize.model import layers, logits, opened
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(2, 16)


def test_the_layer_that_does_least_leaves_and_the_others_close_up(base, job):
    made = job("prune", layers=1, choose="influence")
    notes = prune.run(made, silent)
    (gone,) = notes["dropped"]
    assert notes["influence"][gone] == min(notes["influence"])
    by_hand = opened(base, torch.float32)
    del layers(by_hand)[gone]
    pruned = opened(made.folder / "model", torch.float32)
    assert torch.equal(logits(pruned, IDS), logits(by_hand, IDS))
    assert notes["parameters"] < notes["parameters_before"]


def test_channels_that_are_never_active_cost_nothing(base, job, tmp_path):
    """Half of the MLP made silent: dropping half of it drops just that, and no answer changes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "silent"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp.up_proj" in name:
            tensor[::2] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made = job("prune", model=folder, mlp=0.5)
    prune.run(made, silent)
    assert Checkpoint(made.folder / "model").config["intermediate_size"] == 64
    before = logits(opened(folder, torch.float32), IDS)
    assert torch.allclose(logits(opened(made.folder / "model", torch.float32), IDS), before, atol=1e-4)


def test_healing_brings_back_what_pruning_lost(base, job):
    pruned = job("prune", layers=2)
    prune.run(pruned, silent)
    made = job("heal", model=pruned.folder / "model", out="healed", steps=60, rank=16, batch=8, tokens=24)
    notes = heal.run(made, silent)
    assert notes["lost"] > 0.005
    assert notes["scores"]["healed"] > 0.3
    assert notes["losses"][-1] < notes["losses"][0]


def test_healing_that_was_killed_ends_in_the_same_bytes(base, job, monkeypatch):
    pruned = job("prune", layers=1)
    prune.run(pruned, silent)
    options = {"model": pruned.folder / "model", "steps": 6, "rank": 4, "batch": 2, "tokens": 24}
    monkeypatch.setattr(heal, "SAVE_EVERY", 2)
    whole = job("heal", out="whole", **options)
    heal.run(whole, silent)

    class Killed(Exception):
        pass

    def until_step_5(done: float, *_: object) -> None:
        if done == 5:
            raise Killed

    broken = job("heal", out="broken", **options)
    with pytest.raises(Killed):
        heal.run(broken, until_step_5)
    assert not (broken.folder / "model").exists()
    heal.run(broken, silent)
    first, second = (made.folder / "model/model.safetensors" for made in (whole, broken))
    assert first.read_bytes() == second.read_bytes()
