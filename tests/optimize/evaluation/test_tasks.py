"""Task scores come from lm-eval, on a task of one's own and both models; without lm-eval there is a sentence."""

from __future__ import annotations

import importlib.util
import json

import msgspec
import pytest

from optimize import recipe
from optimize.errors import Refused
from optimize.evaluation import tasks
from optimize.pipeline import plan
from optimize.steps.quantize import quantize
from tests.optimize.conftest import sentences, silent

TASK = """
task: pico
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_tasks_without_lm_eval_are_refused_before_any_work(written, tmp_path, monkeypatch):
    monkeypatch.setattr("optimize.evaluation.rules.find_spec", lambda name: None)
    read = recipe.load(written("steps: [quantize]"), {"evaluate.tasks": "[arc_easy]"})
    with pytest.raises(Refused, match="scored by lm-eval, which is not installed: pip install"):
        plan.made(read, plan.Path(read.model), {}, tmp_path / "out", 10**12)


def test_the_score_that_grows_with_quality_is_the_one_that_counts():
    assert tasks.chosen({"acc,none": 0.4, "acc_norm,none": 0.5}) == 0.5
    with pytest.raises(Refused, match="none grows with quality"):
        tasks.chosen({"perplexity,none": 3.0})


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")
def test_both_models_are_scored_on_a_task_of_ones_own(base, job, tmp_path, monkeypatch):
    """The model was trained on such lines: it knows how they go on better than chance, also in 8 bits."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [line.split() for line in sentences(5, 40)]
    rows = [
        {"start": " ".join(line[:20]), "choices": [line[20], other[30]], "answer": 0}
        for line, other in zip(lines, lines[1:] + lines[:1], strict=True)
        if line[20] != other[30]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pico.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    made = job("quantize")
    quantize.run(made, silent)
    asked = job("tasks", model=made.folder / "model", out="tasks", tasks=[str(tmp_path / "pico.yaml")], task_limit=30)
    scores = tasks.run(asked, silent)["scores"]
    found = scores["tasks"]
    was, now = (found[whose]["pico"]["acc,none"] for whose in ("original", "result"))
    assert scores["task_loss"] == pytest.approx(was - now)
    assert was > 0.7 and abs(was - now) < 0.1
    none = msgspec.structs.replace(asked, options={"tasks": ["no_such_task"], "task_limit": 1})
    with pytest.raises(Refused, match="knows no task 'no_such_task'"):
        tasks.run(none, silent)
