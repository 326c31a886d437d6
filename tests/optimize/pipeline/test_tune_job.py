"""A folder with a recipe becomes a folder with an adapter, however often whoever makes it is stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from optimize import cli
from optimize.pipeline import manifest
from tests.campaigns.kills import ROOT, files
from tests.optimize.conftest import Adapter, sentences

TUNE: dict[str, Any] = {"train": "train.jsonl", "validation": "valid.jsonl", "rank": 4, "epochs": 20, "batch": 4,
                        "learning_rate": 1e-3, "patience": 0}  # fmt: skip


def completions(seed: int, count: int) -> str:
    """Eight words, and the eight that follow."""
    lines = [line.split() for line in sentences(seed, count)]
    rows = [{"prompt": " ".join(words[:8]), "completion": " ".join(words[8:16])} for words in lines]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """A job's folder."""

    def make(name: str = "job", model: Path = base, **options: Any) -> Path:
        where = tmp_path / name
        where.mkdir()
        (where / "train.jsonl").write_text(completions(5, 16))
        (where / "valid.jsonl").write_text(completions(6, 4))
        recipe = {"model": str(model), "steps": [{"tune": TUNE | options}], "export": {"format": "adapter"}}
        (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return where

    return make


def tune(where: Path, *flags: str) -> int:
    return cli.run(["tune", str(where), *flags], Path)


def started(where: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "optimize.cli", "tune", str(where)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def lines(where: Path) -> list[dict[str, Any]]:
    file = where / "progress.jsonl"
    whole, _, _ = file.read_text().rpartition("\n") if file.exists() else ("", "", "")
    return [json.loads(line) for line in whole.splitlines()]


def until(process: subprocess.Popen[bytes], done: Callable[[], bool]) -> None:
    while not done():
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.01)


def test_stopped_then_killed_it_ends_in_the_bytes_of_an_undisturbed_run(folder):
    whole, broken = folder("whole"), folder("broken")
    assert tune(whole) == 0
    running = started(broken)
    until(running, lambda: len(lines(broken)) >= 3)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 4
    reached = len(lines(broken))
    said = json.loads((broken / "error.json").read_text())
    assert said["class"] == "Stopped" and f"stopped after step {reached} of 80" in said["message"]
    running = started(broken)
    until(running, lambda: len(lines(broken)) >= reached + 5)
    assert lines(broken)[reached]["step"] == reached + 1
    running.kill()
    running.wait()
    assert not (broken / "adapter").exists()
    assert tune(broken) == 0
    assert files(broken / "adapter") == files(whole / "adapter")
    assert json.loads((broken / "settings.json").read_text())["learning_rate"] == 1e-3
    assert not (broken / "error.json").exists() and not (broken / "adapter.work").exists()
    assert tune(broken) == 0  # done is done
    read = json.loads((whole / "adapter/manifest.json").read_text())
    jsonschema.validate(read, manifest.schema())
    (step,) = read["steps"]
    assert step["options"]["train"] == "train.jsonl" and len(step["notes"]["data"]["train"]["sha256"]) == 64
    assert str(whole.parent) not in (whole / "adapter/manifest.json").read_text()
    assert read["scores"]["valid_loss"] < read["scores"]["valid_loss_before"]
    assert "| held-out loss |" in (whole / "adapter/report/report.md").read_text()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(read["files"])


@pytest.mark.usefixtures("steps_here")
def test_it_goes_on_from_an_adapter_whose_digest_the_manifest_names(folder, adapter: Adapter):
    parent = adapter()
    where = folder(epochs=1, adapter="parent")
    recipe = yaml.safe_load((where / "recipe.yaml").read_text())
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"adapters": {"parent": str(parent)}}))
    assert tune(where) == 0
    read = json.loads((where / "adapter/manifest.json").read_text())
    assert read["adapters"]["parent"] == files(parent)
    assert read["steps"][0]["notes"]["rank"] == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": "nowhere.jsonl"}, "cannot be read: No such file"),
        ({"train": "recipe.yaml"}, "Invalid file format. Line 1: is not JSON"),
        ({"method": "dpo"}, "is a completion example, which the method supervised takes, not dpo"),
        ({"targets": ["q_prj"]}, "the model has no linear layer 'q_prj'; its layers have down_proj"),
        ({"adapter": "parent"}, "there is no adapter 'parent'"),
        ({"rank": 0}, "rank is above 0, not 0"),
        ({"ranks": 4}, "has no key 'ranks'; did you mean rank?"),
        ({"validation": "train.jsonl"}, "train and validation are the same file"),
        ({"epochs": "many"}, "epochs: "),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_any_work(change, says, folder, capsys):
    where = folder(**change)
    assert tune(where) == 2
    assert says in capsys.readouterr().err
    assert says in json.loads((where / "error.json").read_text())["message"]
    assert sorted(path.name for path in where.iterdir()) == ["error.json", "recipe.yaml", "train.jsonl", "valid.jsonl"]


def test_a_recipe_that_does_more_than_train_is_refused(folder, capsys):
    where = folder()
    (where / "recipe.yaml").write_text("steps: [quantize]")
    assert tune(where) == 2
    assert "has tune steps alone and `export: {format: adapter}`" in capsys.readouterr().err


def test_what_is_no_folder_is_a_sentence(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    for place in (tmp_path / "train.jsonl", tmp_path / "nowhere"):
        assert tune(place) == 2
        assert f"{place} is no folder: give the one that has the recipe.yaml" in capsys.readouterr().err


def test_the_plan_says_what_auto_becomes_and_does_nothing(folder, capsys):
    where = folder(epochs="auto", learning_rate="auto", rank=16, batch="auto")
    assert cli.run([str(where / "recipe.yaml"), "--out", str(where / "out"), "--plan", "--json"], Path) == 0
    plan = json.loads(capsys.readouterr().out)
    first, last = plan["steps"]
    assert first["what"] == ("adapter: supervised on 16 examples, rank 16, 6 epochs of 16 steps, learning rate 0.002")
    assert last["kind"] == "export" and plan["memory"] > 0
    assert not (where / "out").exists()


@pytest.mark.usefixtures("steps_here")
def test_a_held_out_loss_that_is_too_high_fails_the_gate(folder, capsys):
    where = folder(epochs=1)
    recipe = yaml.safe_load((where / "recipe.yaml").read_text())
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"gate": {"max_valid_loss": 0.0}}))
    assert tune(where) == 3
    assert "held-out loss of the trained adapter, nats is" in capsys.readouterr().err
    assert not (where / "adapter").exists()


@pytest.mark.usefixtures("steps_here")
def test_a_trained_adapter_is_merged_and_measured_like_any_other(written, tmp_path):
    (tmp_path / "train.jsonl").write_text(completions(5, 16))
    steps = "- tune: {train: train.jsonl, epochs: 1, rank: 4, name: fresh}\n- merge: {adapters: [fresh]}\n"
    assert cli.run([str(written(f"steps:\n{steps}")), "--out", str(tmp_path / "out")], Path) == 0
    read = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [step["step"] for step in read["steps"]] == ["tune", "merge"] and "perplexity" in read["scores"]
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_picture_that_cannot_be_drawn_fails_no_training(folder, tmp_path):
    """As installed for serving: no matplotlib."""
    where = folder(epochs=1)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    command = [sys.executable, "-m", "optimize.cli", "tune", str(where)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=False)
    assert done.returncode == 0
    report = next(where.rglob("report.md")).read_text()
    assert "no pictures: matplotlib is not installed" in report and "![" not in report
    assert "no pictures" in next(where.rglob("report.html")).read_text()
