"""The plan goes by what this machine takes for a layer of the model."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from optimize import cli
from optimize.errors import Refused
from optimize.pipeline import machine, plan, probe
from optimize.pipeline.resident import Resident
from optimize.recipe import load
from optimize.steps.planning import Machine
from tests.support import families


def test_a_layer_and_a_matrix_of_the_model_are_measured_in_a_process_like_a_steps(written):
    recipe = load(written("steps: []"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and all(value > 0 for name, value in asdict(found).items() if name != "note")
    assert 100e6 < found.process < 1e9 and found != Machine()


@pytest.mark.parametrize("family", ["Falcon-H1", "Mamba 2", "Gemma 3n", "Qwen3-Next", "LFM2", "GPT-2", "DeepSeek V3"])
def test_a_layer_of_a_family_that_is_not_like_llama_runs_alone_too(family, tmp_path):
    """Of two of them the kinds of layers follow from their number, and could not be set: nobody was told."""
    found = probe.layer(families.written(family, tmp_path / "base"), 16)
    assert not found["note"]


def test_a_family_of_which_no_layer_runs_alone_is_measured_by_its_matrices_and_the_plan_says_why(
    written, tmp_path, monkeypatch, capsys
):
    def fails(_: Path) -> None:
        raise ValueError("layers share their keys")

    monkeypatch.setattr(probe, "one_layer", fails)
    recipe = load(written("steps: []"))
    found = probe.layer(Path(recipe.model), 16)
    assert found["layer"] > 0 and found["answering"] > 0
    assert found["note"].endswith("no layer of it runs alone (ValueError: layers share their keys)")
    planned = plan.made(recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, lambda: Machine(**found))
    cli.show(planned, tmp_path / "out")
    assert capsys.readouterr().out.endswith("(ValueError: layers share their keys)\n")
    cli.show_json(planned, tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["note"] == found["note"]


def test_where_nothing_can_be_measured_a_plan_is_made_all_the_same_and_says_so(written, tmp_path):
    with closing(Resident()) as resident:
        found = machine.measured(load(written("steps: []")), tmp_path, resident)
    assert found == Machine(note=found.note) and found.note.startswith("this machine was not measured")


def test_nothing_is_measured_for_what_is_refused(written, tmp_path):
    def measured() -> Machine:
        raise AssertionError("a model was measured")

    recipe = load(written("steps: [{prune: {layers: 99}}]"))
    with pytest.raises(Refused, match="so 99 cannot be dropped"):
        plan.made(recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, measured)


STEPS = {
    "quantize": "steps: [{quantize: {scheme: w4a16}}]",
    "prune": "steps: [{prune: {layers: 1}}]",
    "zeros": "steps: [{prune: {pattern: 2:4}}]",
    "evaluate": "steps: []",
}


@pytest.mark.parametrize("kind", STEPS)
def test_on_a_slower_machine_each_step_is_planned_to_take_longer(kind, written, tmp_path):
    recipe = load(written(STEPS[kind]))
    usual = replace(Machine(), layer=1e-5)
    slow = Machine(**{field.name: 10 * getattr(usual, field.name) for field in fields(Machine)})
    seconds, memory = zip(
        *(
            (first.seconds, first.memory)
            for each in (usual, slow)
            for first in plan.made(
                recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, lambda each=each: each
            ).steps[:1]
        ),
        strict=True,
    )
    assert seconds[1] == pytest.approx(10 * seconds[0], rel=0.01)
    assert memory[1] - memory[0] == 9 * usual.process
