"""A step whose code is another is redone: its digest covers all that it uses."""

from __future__ import annotations

import pytest

from optimize.checkpoint import artifact
from optimize.pipeline import step_code
from optimize.pipeline.worker import TASKS, work
from optimize.steps.kind import kinds


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


@pytest.mark.parametrize("kind", [*TASKS, *kinds()])
def test_every_kind_of_step_has_code(kind):
    assert step_code.of(kind) == artifact.key([step_code.digest(work(kind))])


def test_the_code_of_a_method_counts_where_it_is_chosen():
    code = {method: step_code.of("quantize", {"method": method}) for method in ("gptq", "rtn", "awq", "awq-gptq")}
    assert len(set(code.values())) == 4
