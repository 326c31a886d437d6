"""Pruning leaves the model that a hand would leave, and healing brings some of it back, wherever it is interrupted."""

from __future__ import annotations

import shutil

import pytest
import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import entered, layers, logits, opened
from optimize.errors import OptimizeError
from optimize.steps.prune import distillation, heal, prune, repair
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(2, 16)


def test_the_layer_that_does_least_leaves_and_the_others_close_up(base, job):
    made = job("prune", layers=1)
    notes = prune.run(made, silent)
    (gone,) = notes["dropped"]
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


def test_healing_learns_from_short_texts_too(base, job):
    pruned = job("prune", layers=1)
    prune.run(pruned, silent)
    made = job("heal", model=pruned.folder / "model", out="healed", steps=2, rank=4, batch=2, tokens=64)
    assert heal.run(made, silent)["trained_tokens"] == 2 * 2 * 64


def test_healing_that_was_killed_ends_in_the_same_bytes(base, job, monkeypatch):
    pruned = job("prune", layers=1)
    prune.run(pruned, silent)
    options = {"model": pruned.folder / "model", "steps": 6, "rank": 4, "batch": 2, "tokens": 24}
    monkeypatch.setattr(distillation, "SAVE_EVERY", 2)
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


def test_least_squares_find_the_matrix_that_was_lost(base):
    teacher, student = opened(base, torch.float32), opened(base, torch.float32)
    part = layers(student)[0].mlp.down_proj
    part.weight = torch.nn.Parameter(part.weight.roll(7, 0) / 3, requires_grad=False)
    ids = torch.randint(2, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    before = (logits(student, IDS) - logits(teacher, IDS)).square().mean()
    begin = entered(teacher, ids, 4)
    told = repair.repaired(list(layers(student)), list(layers(teacher)), [0, 1, 2], 0, begin, silent)
    assert told[0][1] < 0.2 * told[0][0]
    assert (logits(student, IDS) - logits(teacher, IDS)).square().mean() < 0.05 * before


def test_healing_without_a_step_of_training_is_least_squares_alone(base, job):
    pruned = job("prune", layers=1)
    prune.run(pruned, silent)
    made = job("heal", model=pruned.folder / "model", out="healed", steps=0, tokens=24)
    notes = heal.run(made, silent)
    assert notes["repair"]["left"] == notes["left"] < notes["lost"] and "losses" not in notes


def test_the_gradient_of_the_distance_is_the_one_that_autograd_finds():
    torch.manual_seed(0)
    head, theirs = torch.randn(50, 8), torch.randn(3, 100, 8)
    ours = torch.randn(3, 100, 8, requires_grad=True)
    loss, gradient = distillation.distance(distillation.Head(head), ours.detach(), theirs)
    wanted, said = ((states @ head.T).log_softmax(-1) for states in (theirs, ours))
    right = (wanted.exp() * (wanted - said)).sum(-1).mean()
    right.backward()
    assert abs(loss - right.item()) < 1e-5
    assert torch.allclose(gradient, ours.grad, atol=1e-7)


@pytest.mark.parametrize("options", [{"layers": 1}, {"mlp": 0.5}, {"sparsity": 0.5}])
def test_broken_weights_are_said_before_anything_is_written(options, base, job, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    made = job("prune", model=broken, **options)
    with pytest.raises(OptimizeError, match="NaN or infinity"):
        prune.run(made, silent)
    assert not (made.folder / "model/config.json").exists()
