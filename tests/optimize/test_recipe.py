"""A recipe says what it takes, or which key is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimize import cli, recipe
from optimize.errors import RecipeError
from optimize.recipe import load, parse, shipped
from optimize.steps.prune.heal_rules import Heal
from optimize.steps.prune.rules import Prune
from optimize.steps.quantize.rules import Quantize


def test_the_recipes_that_come_along_are_recipes():
    assert set(shipped()) >= {
        "int8-cpu",
        "w4a16-gpu",
        "w4a16-mixed",
        "fp8-gpu",
        "merge-and-int8",
        "prune-and-heal",
        "onnx-int4",
    }
    for name, what in shipped().items():
        assert load(name, {"adapters.tone": "/somewhere"}).model == "smollm2"
        assert len(what) > 20


def test_steps_keep_their_order_and_paths_begin_at_the_recipe(tmp_path):
    text = "model: ./m\nadapters: {a: ./one}\noutput: out\n"
    text += "steps:\n- prune: {layers: 1}\n- heal\n- quantize: {scheme: w8a8}"
    made = parse(text, tmp_path)
    assert [type(step) for step in made.steps] == [Prune, Heal, Quantize]
    assert (made.model, made.output, made.adapters["a"]) == (f"{tmp_path}/m", f"{tmp_path}/out", f"{tmp_path}/one")


def test_a_recipe_is_frozen():
    made = parse("model: x", Path("/"))
    with pytest.raises(AttributeError):
        made.seed = 3  # type: ignore[misc]
    assert recipe.changed(made, seed=3).seed == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: x", "no key 'modle'; did you mean model?"),
        ("quantise: {scheme: w8a8}", "key 'quantise' at its top; quantize is a step: `steps: [{quantize: ...}]`"),
        ("merge: {adapters: [one]}", "key 'merge' at its top; merge is a step"),
        ("steps: [{quantise: {}}]", "'quantise', which is not a step; did you mean quantize?"),
        ("steps: [{quantize: {sheme: w8a8}}]", "step 1, quantize has no key 'sheme'; did you mean scheme?"),
        ("gate: {min_top: 1.0}", "gate has no key 'min_top'; did you mean min_top1?"),
        ("steps: [{quantize: {scheme: w2}}]", "scheme: invalid enum value 'w2'"),
        ("steps: [{prune: {layers: two}}]", "layers: expected `int`, got `str`"),
        ("steps: {prune: {}}", "steps is a list"),
        ("steps: [{prune: {}}]", "say `layers: N`"),
        ("steps: [{quantize: {}}, {heal: {}}]", "heal before quantizing"),
        ("steps: [{quantize: {}}, {prune: {layers: 1}}]", "the model is quantized by then"),
        ("steps: [{quantize: {}}, {quantize: {}}]", "one quantize step does all"),
        ("steps: [{merge: {adapters: [tone]}}]", "there is no adapter 'tone'"),
        ("adapters: {a: x}\nsteps: [{merge: {adapters: [a], weights: [1, 2]}}]", "2 weights for 1 adapters"),
        ("adapters: {a: x}\nsteps: [{combine: {name: b, adapters: [a], density: 0}}]", "density is above 0"),
        ("adapters: {a: x}\nsteps: [{combine: {name: .., adapters: [a]}}]", "plain name of its own"),
        ("steps: [{quantize: {scheme: w4a16, bits: 4.5, budget: 0.1}}]", "give one of them"),
        ("steps: [{quantize: {scheme: w4a16, bits: 3.5}}]", "above 4 and below 16 for w4a16, not 3.5"),
        ("steps: [{quantize: {scheme: w8a8, method: awq-gptq}}]", "go with w4a16, not w8a8"),
        ("steps: [{quantize: {scheme: w8a8, method: gptaq}}]", "go with w4a16, not w8a8"),
        ("steps: [{quantize: {scheme: w4a16, format: gptq, agreement: 0.9}}]", "knows one precision"),
        ("gate: {min_healed: 0.5}", "needs a heal step"),
        ("gate: {min_speed: 1}\nevaluate: {engine: false}", "measured in the engine"),
        ("evaluate: {adapter_texts: {tone: x}}", "adapter_texts has 'tone', and there is no such adapter"),
        ("export: {format: adapter}", "needs a combine or tune step"),
        ("calibration: {samples: 0}", "samples is at least 1"),
        ("gate: {max_kl: .nan}", "gate: max_kl takes finite numbers, not nan"),
        (
            "adapters: {a: x}\nsteps: [{merge: {adapters: [a], weights: [.inf]}}]",
            "weights takes finite numbers, not inf",
        ),
        ("adapters: {a: x}\nsteps: [{combine: {name: b, adapters: [a], rank: -3}}]", "rank is above 0, or 0 for"),
        ("seed: 99999999999999999999", "seed is at least 0 and below 2**63"),
        ("export: {shard_bytes: 0}", "shard_bytes above 0"),
        ("gate: {max_kl: &x [*x]}", "max_kl: expected `float | null`, got `array`"),
        ("[1, 2]", "holds `key: value` lines"),
        ("a: [", "not YAML"),
        ("gate: {min_top1: 0.9}\nseed: 1\ngate: {max_kl: 0.1}", "the recipe has 'gate' twice, again in line 3"),
        ("steps: [{prune: {layers: 1, layers: 2}}]", "the recipe has 'layers' twice, again in line 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text, says):
    with pytest.raises(RecipeError) as error:
        parse(text, Path("/"))
    assert says in error.value.message


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean int8-cpu?"):
        load("int8-cup")


def test_a_folder_of_a_recipes_name_is_not_read_as_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int8-cpu").mkdir()
    (tmp_path / "mine").mkdir()
    assert load("int8-cpu").gate.min_top1 == 0.91
    with pytest.raises(RecipeError, match="there is no recipe 'mine'"):
        load("mine")


def test_a_file_of_windows_is_read_as_any_other(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("model: ./m\r\nsteps:\r\n  - quantize\r\n".encode("utf-8-sig"))
    assert [step.kind for step in load(tmp_path / "mine.yaml").steps] == ["quantize"]


def test_a_key_on_the_command_line_lies_over_the_file():
    made = load("int8-cpu", {"gate.min_top1": "0.5", "seed": "7"})
    assert (made.gate.min_top1, made.seed) == (0.5, 7)


@pytest.mark.parametrize(
    ("words", "said"), [(["int8-cpu"], "stopped; go on with --resume\n"), (["check", "train.jsonl"], "stopped\n")]
)
def test_ctrl_c_says_how_to_go_on(words, said, monkeypatch, capsys):
    """typer makes an exit code of it, and nothing was said."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.recipes, "load", interrupted)
    monkeypatch.setattr(cli.examples, "checked", interrupted)
    assert cli.run(words, Path) == 130
    assert capsys.readouterr().err == f"loradock: {said}"
