"""A half-done optimization of an older loradock goes on; a step whose code makes other bytes is redone."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from optimize import cli
from optimize.checkpoint import artifact
from optimize.pipeline import manifest, step_code
from optimize.pipeline.worker import TASKS
from tests.campaigns.kills import files

ARCHIVE = Path(__file__).parents[2] / "fixtures" / "half_done" / "half_done.tar.xz"


def optimize(*arguments: str | Path, expect: int = 0) -> None:
    assert cli.run([str(argument) for argument in arguments], Path) == expect


def done_before(out: Path) -> dict[str, bool]:
    measured = json.loads((out / "report/measurements.json").read_text())
    return {step["step"]: step["done_before"] for step in measured["steps"]}


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """A run of the code before the packages, killed while it measured, as if it had been made here.

    A step's folder is named after the digest of all that it depends on. The place of the texts and the versions of the
    libraries are this machine's; everything else, the code's digest above all, stays as that code wrote it.
    """
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for key, inputs in json.loads((tmp_path / "keys.json").read_text()).items():
        assert artifact.key(inputs) == key
        inputs["text"]["text"] = str(tmp_path / Path(inputs["text"]["text"]).name)
        inputs["versions"] = manifest.versions()
        for folder in tmp_path.glob(f"out.work/*-{key}"):
            folder.rename(folder.with_name(folder.name.replace(key, artifact.key(inputs))))
    return tmp_path


def test_what_the_code_before_the_packages_finished_is_taken_over(half_done, capsys):
    recipe, out, whole = half_done / "recipe.yaml", half_done / "out", half_done / "whole"
    optimize(recipe, "--out", out, "--resume")
    said = capsys.readouterr().err
    assert "prune 100%  done before" in said and "quantize 100%  done before" in said
    assert done_before(out) == {"prune": True, "quantize": True, "evaluate": False}
    optimize(recipe, "--out", whole)
    assert done_before(whole) == {"prune": False, "quantize": False, "evaluate": False}
    assert files(out) == files(whole)


def test_a_step_that_makes_other_bytes_now_is_redone(half_done, monkeypatch):
    monkeypatch.delitem(step_code.SAME_BYTES, "quantize")
    optimize(half_done / "recipe.yaml", "--out", half_done / "out", "--resume")
    assert done_before(half_done / "out") == {"prune": True, "quantize": False, "evaluate": False}


def test_what_older_code_began_goes_on_where_it_was(half_done):
    (finished,) = half_done.glob("out.work/02-quantize-*")
    finished.rename(finished.with_name(finished.name + ".part"))
    optimize(half_done / "recipe.yaml", "--out", half_done / "out", "--resume", "--set", "gate.max_kl=-1", expect=3)
    assert list(half_done.glob("out.work/02-quantize-*")) == [finished]


def test_the_digest_of_a_step_covers_every_module_of_ours_that_it_uses(tmp_path, monkeypatch):
    package = tmp_path / "optimize" / "steps"
    package.mkdir(parents=True)
    (package / "step.py").write_text("from optimize.steps import first\nfrom optimize.steps.second import work\n")
    (package / "first.py").write_text("from optimize.steps.third import more\n")
    for name in ("second", "third", "stranger"):
        (package / f"{name}.py").write_text("")
    monkeypatch.setattr(step_code, "ROOT", tmp_path)

    def digest() -> str:
        step_code.digest.cache_clear()
        return step_code.digest("optimize.steps.step")

    before = digest()
    (package / "stranger.py").write_text("changed = True\n")
    assert digest() == before
    for name in ("first", "second", "third"):
        (package / f"{name}.py").write_text((package / f"{name}.py").read_text() + "changed = True\n")
        assert digest() != before
        before = digest()
    step_code.digest.cache_clear()


@pytest.mark.parametrize("kind", TASKS)
def test_today_s_code_comes_first(kind):
    assert step_code.accepted(kind)[0] == step_code.digest(TASKS[kind])
