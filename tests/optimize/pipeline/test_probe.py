"""The plan goes by what this machine takes for a layer of the model."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from optimize import cli, processor
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.errors import Refused
from optimize.evaluation import rules
from optimize.pipeline import machine, plan, probe
from optimize.pipeline.resident import Resident
from optimize.recipe import load
from optimize.steps.planning import Context, Machine
from tests.support import families


def test_a_layer_and_a_matrix_of_the_model_are_measured_in_a_process_like_a_steps(written):
    recipe = load(written("steps: []"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    other = ("note", "learning")
    assert not found.note and all(value > 0 for name, value in asdict(found).items() if name not in other)
    assert 100e6 < found.process < 1e9 and found != Machine()


@pytest.mark.parametrize("family", ["Falcon-H1", "Mamba 2", "Gemma 3n", "Qwen3-Next", "LFM2", "GPT-2", "DeepSeek V3"])
def test_a_layer_of_a_family_that_is_not_like_llama_runs_alone_too(family, tmp_path):
    """Of two of them the kinds of layers follow from their number, and could not be set: nobody was told."""
    found = probe.layer(families.written(family, tmp_path / "base"), 16)
    assert "note" not in found


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
    "onnx": "export: {format: onnx, precision: int4}",
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


@pytest.mark.parametrize(("scheme", "quantizing", "evaluating"), [("w8a8", 2, 1), ("w4a16", 0, 0)])
def test_the_time_in_which_inputs_are_rounded_is_planned(scheme, quantizing, evaluating, written, tmp_path):
    """Of 135M weights it took a third of the 8 bits' step, and was not counted."""
    recipe = load(written(f"steps: [{{quantize: {{scheme: {scheme}}}}}]"))
    shapes = Checkpoint(Path(recipe.model)).shapes
    read = sum(shape[1] for name, shape in shapes.items() if name.endswith("_proj.weight"))

    def seconds(kind, each):
        machine = Machine(rounded_input=each)
        made = plan.made(recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, lambda: machine).steps
        return next(step.seconds for step in made if step.kind == kind)

    for kind, passes, text in (
        ("quantize", quantizing, recipe.calibration),
        ("evaluate", evaluating, recipe.evaluate),
    ):
        assert seconds(kind, 1.0) - seconds(kind, 0.0) == pytest.approx(passes * text.samples * text.tokens * read)


def tuning(written, tmp_path, count, **options):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{at}", "completion": "yes"}) + "\n" for at in range(count)))
    step = json.dumps({"tune": {"train": str(train), "validate": False, **options}})
    return load(written(f"steps: [{step}]\nexport: {{format: adapter}}"))


def test_training_is_planned_by_its_steps_as_well_as_by_its_tokens(written, tmp_path):
    """24 short lines are 96 steps, took two minutes, and were planned at six seconds: tokens alone were counted."""

    def seconds(batch, machine):
        recipe = tuning(written, tmp_path, 24, batch=batch, epochs=4)
        return plan.made(recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, lambda: machine).steps[0].seconds

    small, large = seconds(1, Machine(updating=0.1)), seconds(24, Machine(updating=0.1))
    assert small - large == pytest.approx((96 - 4) * 3 * 0.1, rel=0.05)
    assert seconds(1, Machine(updating=0.1, learning=1.0)) > seconds(1, Machine(updating=0.1, learning=0.1))


@pytest.mark.parametrize("options", [{}, {"dora": True, "targets": ["q_proj"]}])
def test_a_layer_that_learns_is_measured_for_training_alone(options, written, tmp_path, steps_here):
    recipe = tuning(written, tmp_path, 24, **options)
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and found.learning > 0 and found.updating not in (0, Machine().updating)


def test_how_long_torch_traces_a_layer_is_measured_for_a_graph_alone(written):
    """135M took 142 s of a processor and was planned at 63: seconds of another machine's Python."""
    recipe = load(written("export: {format: onnx}"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and found.tracing not in (0, Machine().tracing)


def test_how_long_zeros_take_is_measured_by_the_steps_own_method(written):
    """2:4 zeros of 0.5B took 133 s and were planned at 84, by what another machine had taken."""
    recipe = load(written("steps: [{prune: {pattern: 2:4}}]"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and found.zero not in (0, Machine().zero) and found.merging == Machine().merging


def test_how_long_a_merge_takes_is_measured_where_there_is_one(written, adapter):
    """1.5B took 56 s and was planned at 35, by passes over all weights; the others' plans do not wait for it."""
    recipe = load(written(f"steps: [{{merge: {{adapters: [one]}}}}]\nadapters: {{one: {adapter()}}}"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and found.merging not in (0, Machine().merging) and found.zero == Machine().zero


def test_after_a_merge_one_models_tables_are_planned(written, adapter, monkeypatch):
    """9.8 GB were planned for the 5.5 that 8B took without bfloat16, a layer at a time: two models' were counted."""
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)

    def needed(more: str) -> Context:
        recipe = load(written(more))
        return Context(recipe, Checkpoint(Path(recipe.model)), {}, memory=1)

    merge, zeros = "merge: {adapters: [one]}", "prune: {pattern: 2:4}"
    one = needed(f"steps: [{{{merge}}}]\nadapters: {{one: {adapter()}}}")
    two = needed(f"steps: [{{{zeros}}}]")
    assert rules.estimates(two)[0].memory - rules.estimates(one)[0].memory == 4 * one.outside_layers


def test_a_step_of_healing_and_an_adapter_that_is_measured_have_a_cost_of_their_own(written, tmp_path, adapter):
    """They were counted by their tokens alone."""

    def seconds(more, kind, machine):
        recipe = load(written(more))
        made = plan.made(recipe, Path(recipe.model), {}, tmp_path / "out", 10**12, lambda: machine).steps
        return next(each.seconds for each in made if each.kind == kind)

    heal = "steps: [{prune: {layers: 1}}, {heal: {steps: 100, batch: 1, tokens: 1}}]"
    quick, slow = (seconds(heal, "heal", Machine(answering=each)) for each in (0.01, 0.11))
    assert slow - quick == pytest.approx(4 * 100 * 3 * 0.1)
    adapters = f"adapters: {{one: {adapter()}}}"
    quick, slow = (seconds(adapters, "evaluate", Machine(opening=each)) for each in (0.1, 1.1))
    assert slow - quick == pytest.approx(2 + 3)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_onnx_runtime_is_measured_with_a_matrix_of_the_exports_own_precision(precision, written):
    """What read an ONNX export was planned as PyTorch's: 1.7 s for 4.8."""
    recipe = load(written(f"export: {{format: onnx, precision: {precision}}}"))
    with closing(Resident()) as resident:
        found = machine.measured(recipe, Path(recipe.model), resident)
    assert not found.note and found.onnx_reading != Machine().onnx_reading
    assert found.onnx_reading > 0 and found.onnx_answering > 0
    assert found.onnx_opening != Machine().onnx_opening and found.onnx_rounding != Machine().onnx_rounding
