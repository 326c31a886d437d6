"""What somebody else's package adds: one file and one line each, as docs/contributing.md shows them."""

from __future__ import annotations

import json

import pytest
import torch

from optimize import plugins
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.cli import run
from optimize.errors import RecipeError
from optimize.recipe import load
from optimize.steps.quantize import methods
from tests.support import package


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """`stranger(module)` installs the module of this name that the page shows."""
    folder = tmp_path / "site"
    folder.mkdir()
    plugins.found.cache_clear()
    yield lambda module: package.installed(folder, module, monkeypatch)
    plugins.found.cache_clear()


def made(written, tmp_path, steps):
    out = tmp_path / "out"
    assert run([str(written(steps)), "--out", str(out)], lambda name: tmp_path) == 0
    return out


def test_a_method_of_another_package_quantizes(stranger, written, tmp_path, base, steps_here):
    stranger("toward_zero")
    out = made(written, tmp_path, "steps: [{quantize: {method: toward-zero, smooth: false}}]")
    name = "model.layers.1.mlp.up_proj"
    weight, exported = Checkpoint(base).tensor(f"{name}.weight").float(), Checkpoint(out)
    rounded = exported.tensor(f"{name}.weight").float() * exported.tensor(f"{name}.weight_scale").float()
    assert bool((rounded.abs() <= weight.abs() + 1e-6).all()) and bool((rounded * weight >= 0).all())
    assert json.loads((out / "manifest.json").read_text())["steps"][0]["options"]["method"] == "toward-zero"


def test_a_method_in_the_folder_of_methods_is_found_too(stranger, written, tmp_path, monkeypatch):
    source = stranger("toward_zero").replace('"toward-zero"', '"towards-zero"')
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "towards_zero.py").write_text(source)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "more")])
    recipe = load(written("steps: [{quantize: {method: towards-zero}}]"))
    assert recipe.steps[0].method == "towards-zero"


def test_a_step_of_another_package_runs_and_says_what_it_takes(stranger, written, tmp_path, base, steps_here):
    stranger("double")
    with pytest.raises(RecipeError, match="step 1, double: by is above 0"):
        load(written("steps: [{double: {by: -1}}]"))
    out = made(written, tmp_path, "steps: [{double: {by: 3}}]")
    assert torch.equal(Checkpoint(out).tensor("model.norm.weight"), 3 * Checkpoint(base).tensor("model.norm.weight"))


def test_an_unknown_method_is_told_what_there_is(written):
    with pytest.raises(RecipeError, match="method takes one of .*gptq.*, not 'gtpq'"):
        load(written("steps: [{quantize: {method: gtpq}}]"))


def test_a_package_that_cannot_be_loaded_says_which_it_is(stranger, tmp_path, written):
    stranger("toward_zero")
    (tmp_path / "site" / "toward_zero.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(RecipeError, match="toward_zero offers .*cannot be loaded .*pip uninstall toward_zero"):
        load(written("steps: [quantize]"))
