"""Task scores through lm-eval, of the original and of the result: its own tasks, or a task file of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimize.checkpoint.model import opened, settle, tokenizer
from optimize.errors import Refused
from optimize.job import Job, Progress

BATCH = 8
# The first of these that a task has is what it is judged by.
METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "exact_match,strict-match", "f1,none")


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    names, limit = job.options["tasks"], job.options["task_limit"] or None
    by_model: dict[str, dict[str, dict[str, float]]] = {}
    for done, (whose, folder) in enumerate((("original", job.reference), ("result", job.model))):
        progress(done, 2, f"the {whose} on {', '.join(Path(name).stem for name in names)}")
        by_model[whose] = scored(Path(folder), names, limit, job.seed, job.device)
    old, new = by_model["original"], by_model["result"]
    lost = {task: chosen(old[task]) - chosen(new[task]) for task in old}
    return {"scores": {"tasks": by_model, "task_loss": round(max(lost.values()), 5)}}


def scored(
    folder: Path, names: Sequence[str], limit: int | None, seed: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """task -> metric -> score of the model in `folder`; `limit` is how many questions of each task are asked."""
    # The harness writes progress bars and looks for devices; neither is wanted here.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(folder) for folder in {file.parent for file in files}] or None)
    task_names = [_named(Path(name)) if Path(name) in files else name for name in names]
    unknown = sorted(set(task_names) - set(manager.all_tasks))
    if unknown:
        raise Refused(f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` shows those that there are")
    model: Any = HFLM(
        pretrained=opened(folder), tokenizer=tokenizer(folder), device=device, batch_size=BATCH
    )  # fmt: skip
    evaluated = simple_evaluate(
        model, tasks=list(task_names), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    assert evaluated is not None
    return {
        task: {
            metric: round(float(value), 5)
            for metric, value in sorted(scores.items())
            if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
        }
        for task, scores in sorted(evaluated["results"].items())
    }


def chosen(scores: Mapping[str, float]) -> float:
    """The score that a task is judged by."""
    for metric in METRICS:
        if metric in scores:
            return scores[metric]
    raise Refused(f"of the task's scores {', '.join(scores)} none grows with quality: take a task with accuracy")


def _named(file: Path) -> str:
    import yaml

    try:
        return str(yaml.safe_load(file.read_text())["task"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Refused(f"{file} is no task of lm-eval, which has a line `task: NAME`: {error}") from error
