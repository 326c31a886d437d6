"""The plan goes by what this machine takes for a layer of the model."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from optimize.errors import Refused
from optimize.pipeline import machine, plan, probe
from optimize.pipeline.resident import Resident
from optimize.recipe import load
from optimize.steps.planning import Machine


def test_a_layer_and_a_matrix_of_the_model_are_measured_in_a_process_like_a_steps(written):
    recipe = load(written("steps: []"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert all(value > 0 for value in asdict(found).values())
    assert 100e6 < found.process < 1e9 and found != Machine()


def test_a_family_of_which_no_layer_stands_alone_is_measured_by_its_matrices(written, monkeypatch):
    def fails(_: Path) -> None:
        raise ValueError("layers share their keys")

    monkeypatch.setattr(probe, "one_layer", fails)
    found = probe.layer(Path(load(written("steps: []")).model), 16)
    assert min(found.values()) > 0


def test_where_nothing_can_be_measured_a_plan_is_made_all_the_same(written, tmp_path):
    with closing(Resident()) as resident:
        assert machine.measured(load(written("steps: []")), tmp_path, resident) == Machine()


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
