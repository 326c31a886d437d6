"""A run can be killed at any moment, ends in the same bytes, and shows nothing before it is good."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimize import cli
from optimize.checkpoint import artifact
from optimize.pipeline import child, manifest, plan
from optimize.steps.planning import Machine
from tests.campaigns.kills import files, killed
from tests.optimize.conftest import Adapter

KILLS = int(os.environ.get("LORADOCK_TEST_KILLS", "3"))
STEPS = """
steps:
- prune: {layers: 1}
- heal: {steps: 30, rank: 4, batch: 2, tokens: 24}
- quantize: {scheme: w4a16}
gate: {max_kl: 20}
"""


def optimize(*arguments: str | Path, expect: int = 0) -> None:
    def none_come_along(name: str) -> Path:
        raise AssertionError(name)

    assert cli.run([str(argument) for argument in arguments], none_come_along) == expect


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("whole") / "out"}


@pytest.fixture
def whole(undisturbed: dict[str, Any], written: Callable[[str], Path]) -> Path:
    """The export of an undisturbed run."""
    folder: Path = undisturbed["folder"]
    if not folder.exists():
        optimize(written(STEPS), "--out", folder)
    return folder


def test_an_export_is_complete_and_its_manifest_true(whole):
    read = json.loads((whole / "manifest.json").read_text())
    jsonschema.validate(read, manifest.schema())
    assert read["gate"]["passed"] and [step["step"] for step in read["steps"]] == ["prune", "heal", "quantize"]
    found = {name: digest for name, digest in files(whole).items() if name != "manifest.json"}
    assert read["files"] == found
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= set(found)
    report = whole / "report"
    assert "| perplexity |" in (report / "report.md").read_text()
    assert (report / "report.html").read_text().count("<svg") >= 2
    assert str(whole.parent) not in (whole / "manifest.json").read_text()
    assert not whole.with_name("out.work").exists()


def test_killed_at_any_moment_and_resumed_it_ends_in_the_same_bytes(whole, written, tmp_path):
    out = tmp_path / "out"
    assert killed([written(STEPS)], out, files(whole), KILLS, 9.0, seed=4) >= 1


@pytest.mark.usefixtures("steps_here")
def test_resume_does_nothing_twice(written, tmp_path, monkeypatch):
    recipe, out = written(STEPS.replace("max_kl: 20", "max_kl: 0")), tmp_path / "out"
    optimize(recipe, "--out", out, expect=3)
    work = out.with_name("out.work")
    assert len(list(work.glob("[0-9]*"))) == 4
    # The gate alone is another: nothing is computed again.
    monkeypatch.setattr("optimize.pipeline.machine.measured", lambda *_: Machine())
    monkeypatch.setattr(child.Child, "run", lambda *_: pytest.fail("a step was computed again"))
    optimize(recipe, "--out", out, "--resume", "--set", "gate.max_kl=20")
    told = json.loads((out / "report/measurements.json").read_text())
    assert [step["done_before"] for step in told["steps"]] == [True] * 4


@pytest.mark.usefixtures("steps_here")
def test_what_fails_the_gate_leaves_a_report_and_no_export(written, tmp_path, capsys):
    recipe, out = written("steps: [{quantize: {method: rtn}}]\ngate: {max_kl: 0, min_top1: 1.01}"), tmp_path / "out"
    optimize(recipe, "--out", out, expect=3)
    said = capsys.readouterr().err
    assert "KL divergence" in said and "to be at most 0" in said
    assert not out.exists()
    assert "**not passed**" in (tmp_path / "out.report/report.md").read_text()
    optimize(recipe, "--out", out, "--resume", "--keep-rejected", expect=3)
    assert not out.exists()
    assert json.loads((tmp_path / "out.rejected/manifest.json").read_text())["gate"]["passed"] is False


def test_a_step_that_grows_above_its_memory_is_stopped_and_says_so(written, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimize.pipeline.machine.measured", lambda *_: Machine(process=0))
    optimize(written("steps: [quantize]"), "--out", tmp_path / "out", "--memory", "0.15", expect=1)
    said = capsys.readouterr().err
    assert "was stopped at the bound of 0.1 GB" in said and "--memory" in said
    assert not (tmp_path / "out").exists()


def test_a_killed_step_says_so(written, tmp_path, capsys, monkeypatch):
    listen = child.Child._listen

    def kill(self: Any, kind: str, process: Any, pipe: int) -> Any:
        process.kill()
        return listen(self, kind, process, pipe)

    monkeypatch.setattr(child.Child, "_listen", kill)
    optimize(written("steps: [quantize]"), "--out", tmp_path / "out", expect=1)
    assert "was killed at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("steps: [{quantize: {scheme: w8a16}}]", "no w8a16 kernel for CPUs"),
        ("steps: [{quantize: {scheme: fp8}}]", "only emulates fp8"),
        ("steps: [{quantize: {scheme: w4a16, group: 96}}]", "do not divide layers of width [64, 128]"),
        ("steps: [{quantize: {scheme: w4a16, group: 40}}]", "vLLM takes multiples of 32"),
        ("steps: [{prune: {layers: 3}}]", "the model has 3 layers"),
        ("steps: [quantize]\nexport: {format: onnx}", "ONNX has its own int8 and int4"),
        ("adapters: {a: ./nowhere}", "no readable adapter_config.json"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(steps, says, written, tmp_path, capsys):
    optimize(written(steps), "--out", tmp_path / "out", expect=2)
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("out", ["out", "deeper/out"])
def test_a_place_where_nothing_can_be_made_is_refused_before_any_work(out, written, tmp_path, capsys):
    (tmp_path / "a file").write_text("precious")
    recipe = written("steps: [quantize]")
    for more in (["--plan"], []):
        optimize(recipe, "--out", tmp_path / "a file" / out, *more, expect=2)
        assert "is a file; name another place with --out" in capsys.readouterr().err
    assert (tmp_path / "a file").read_text() == "precious"


def test_a_disk_that_takes_no_folder_is_a_sentence(written, capsys, monkeypatch):
    roomy = plan.shutil.disk_usage("/tmp")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: roomy)
    monkeypatch.setattr(plan.os, "access", lambda *_: True)
    optimize(written("steps: [quantize]"), "--out", "/proc/out", expect=1)
    assert "loradock: FileNotFoundError: " in capsys.readouterr().err


def broken(folder: Path, how: str) -> Path:
    """The model with something wrong of its weights."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if how == "cut short":
        os.truncate(weights, weights.stat().st_size - 100)
        return folder
    weight_map: Any = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    weights.rename(folder / "model-00001-of-00002.safetensors")
    index.write_text("{" if how == "no index" else json.dumps({"weight_map": 5 if how == "no map" else weight_map}))
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut short", "bytes that its header names: it was cut short, fetch it again"),
        ("a shard", "lacks model-00002-of-00002.safetensors, one of the 2 files that its"),
        ("no index", "does not say which file has which weight"),
        ("no map", "does not say which file has which weight"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_before_any_work(how, says, written, base, tmp_path, capsys):
    model = broken(shutil.copytree(base, tmp_path / "model"), how)
    for more in (["--plan"], []):
        optimize(written("steps: [quantize]"), "--model", model, "--out", tmp_path / "out", *more, expect=2)
        assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_file_is_no_model_and_says_what_is(written, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    optimize(written("steps: [quantize]"), "--model", tmp_path / "model.gguf", "--out", tmp_path / "out", expect=2)
    assert "is a file, and a recipe begins with a checkpoint's directory" in capsys.readouterr().err


def test_names_and_paths_on_the_command_line_may_have_any_letters(written, base, tmp_path, capsys, adapter: Adapter):
    strange = tmp_path / "a: b #1 [x] {y}"
    model, tone = shutil.copytree(base, strange / "2026"), shutil.copytree(adapter(), strange / "é 模")
    optimize(written("steps: [quantize]"), "--model", model, "--adapter", f"tone.v1={tone}", "--out",
             tmp_path / "out", "--plan")  # fmt: skip
    assert "2026 to" in capsys.readouterr().out
    optimize(written("steps: [quantize]"), "--set", "gate.max_kl={", "--out", tmp_path / "out", expect=2)
    assert "--set gate.max_kl: '{' is not YAML" in capsys.readouterr().err


def test_an_adapter_for_another_base_is_refused(written, tmp_path, capsys, adapter: Adapter):
    from safetensors.torch import load_file, save_file

    folder = adapter()
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    optimize(written(f"adapters: {{a: {folder}}}"), "--out", tmp_path / "out", expect=2)
    assert "'a' is for another base: this one has no model.layers.7" in capsys.readouterr().err


def test_calibration_never_sees_the_evaluation_text(written, texts, tmp_path, capsys):
    recipe = written("steps: [quantize]")
    optimize(recipe, "--out", tmp_path / "out", "--set", f"evaluate.text={texts['calibration']}", expect=2)
    assert "calibration and evaluation share" in capsys.readouterr().err


def test_an_output_that_is_there_is_not_touched(written, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    optimize(written("steps: [quantize]"), "--out", tmp_path / "out", expect=2)
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_the_plan_says_what_would_be_done_and_does_nothing(written, tmp_path, capsys):
    optimize(written(STEPS), "--plan", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "1. prune" in said and "GB memory" in said and "about" in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("steps_here")
def test_adapters_are_judged_on_the_new_base(written, tmp_path, adapter: Adapter):
    folder, out = adapter(), tmp_path / "out"
    optimize(
        written(f"adapters: {{tone: {folder}}}\nsteps: [quantize]\ngate: {{min_adapter_effect: 0.8}}"), "--out", out
    )
    scores = json.loads((out / "manifest.json").read_text())["scores"]
    assert scores["adapters"]["tone"]["cosine"] > 0.8
    assert 0 < scores["adapters"]["tone"]["kl"] < scores["adapters"]["tone"]["kl_to_base"]


@pytest.mark.usefixtures("steps_here")
def test_a_bound_on_adapters_holds_where_none_is_named(written, tmp_path):
    out = tmp_path / "out"
    optimize(written("steps: [{quantize: {method: rtn}}]\ngate: {max_adapter_kl: 0, max_kl: 20}"), "--out", out)
    bounds = json.loads((out / "manifest.json").read_text())["gate"]["bounds"]
    assert [bound["bound"] for bound in bounds] == ["max_kl", "max_size"]


@pytest.mark.usefixtures("steps_here")
def test_what_was_merged_is_nobodys_concern_afterwards(written, tmp_path, adapter: Adapter):
    """Smoothing is left out for adapters that have to go on working; one that is in the model is not one of them."""
    out = tmp_path / "out"
    text = f"adapters: {{tone: {adapter()}}}\nsteps: [{{merge: {{adapters: [tone]}}}}, quantize]"
    optimize(written(text), "--out", out)
    notes = json.loads((out / "manifest.json").read_text())["steps"][1]["notes"]
    assert (notes["smooth"], notes["adapters"]) == (True, {})


@pytest.mark.usefixtures("steps_here")
def test_adapters_become_one_adapter(written, tmp_path, adapter: Adapter):
    out = tmp_path / "out"
    one, two = adapter(seed=1), adapter(seed=2)
    steps = "steps: [{combine: {name: both, adapters: [a, b], method: cat}}]\nexport: {format: adapter}"
    text = f"adapters: {{a: {one}, b: {two}}}\n{steps}"
    optimize(written(text), "--out", out)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert json.loads((out / "manifest.json").read_text())["steps"][0]["notes"]["error"] < 1e-5


@pytest.mark.parametrize("size", ["100k", "250k"])  # full in the step; the export links its files and takes none
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(size, written, tmp_path, capsys, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        recipe = written("steps: [{quantize: {method: rtn}}]")
        optimize(recipe, "--out", small / "out", expect=2)
        assert "MB free and this takes" in capsys.readouterr().err
        roomy = plan.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: roomy)
        optimize(recipe, "--out", small / "out", expect=1)
        assert "the disk is full; free some space and go on with --resume" in capsys.readouterr().err
        assert not (small / "out").exists()
        assert not [path for path in small.rglob("*-quantize-*") if path.suffix != ".part"]
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_what_an_export_writes_anew_stays_as_it_was_in_the_step(tmp_path):
    step, export = tmp_path / "step", tmp_path / "export"
    step.mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json"):
        (step / name).write_text(name)
    shutil.copytree(step, export, copy_function=artifact.taken)
    (export / "model.safetensors.index.json").write_text("other shards")
    assert (step / "model.safetensors.index.json").read_text() == "model.safetensors.index.json"
    assert (export / "model.safetensors").stat().st_ino == (step / "model.safetensors").stat().st_ino


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    (tmp_path / "model.safetensors").write_text("weights")
    monkeypatch.setattr(os, "link", refused)
    artifact.taken(str(tmp_path / "model.safetensors"), str(tmp_path / "copy.safetensors"))
    assert (tmp_path / "copy.safetensors").read_text() == "weights"
