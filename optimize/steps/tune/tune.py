"""A LoRA adapter trained on examples.

Everything about the data is checked before the first step. `job.watched` is a folder where whoever waits finds
progress.jsonl, a line a step, and the adapter at the end of each epoch; `alive` is touched with every row, before the
first step and while held-out examples are read too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import Checkpoint, adapter_config
from optimize.checkpoint.model import settle
from optimize.data.examples import checked
from optimize.job import Job, Progress
from optimize.steps.tune.encoding import Encoded, Encoder
from optimize.steps.tune.learner import Learner, Start
from optimize.steps.tune.objectives import DPO, KTO, Objective, Supervised, sums
from optimize.steps.tune.packing import rows
from optimize.steps.tune.settings import ROW, Settings, max_length, settled
from optimize.steps.tune.training import Examples, State, Training
from optimize.steps.tune.validation import validated

ALIVE = "alive"
KEPT = 3  # epochs whose adapters stay in job.watched


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    options = job.options
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    parent = Path(job.adapters[options["adapter"]]) if options["adapter"] else None
    adapter = adapter_config(parent) if parent else None
    config = Checkpoint(Path(job.model)).config
    labels = sorted(checked(Path(options["train"]), "classify").labels) if options["method"] == "classify" else []
    encoder = Encoder(Path(job.model), max_length(options, config), labels)
    files = {name: encoder.file(Path(options[name]), options["method"]) for name in _given(options)}
    settings = settled(options, config, adapter, files["train"].count, files["train"].longest)
    watched = Path(job.watched) if job.watched else None
    learner = Learner(_start(job, parent, labels), settings, (watched / ALIVE).touch if watched else lambda: None)
    row_tokens = ROW if learner.packs(files["train"].units) else 0
    partial = job.folder / "partial"
    partial.mkdir(exist_ok=True)
    parts = {
        name: Examples(
            encoded.units, _objective(options, learner, encoded, partial / f"{name}-began.pt", row_tokens), row_tokens
        )
        for name, encoded in files.items()
    }
    chosen = _chosen(job, settings, files, packed=row_tokens > 0)
    if watched is not None:
        artifact.write_json(watched / "settings.json", chosen)
    training = Training(
        learner, settings, parts["train"], parts.get("validation"), job.seed, options["patience"],
        lambda line: _tell(line, progress, watched), lambda step, state: _publish(learner, watched, step, state),
    )  # fmt: skip
    state = training.run(partial / "state.pt")
    adapter_folder = job.folder / "adapters" / options["name"]
    learner.save(state, adapter_folder)
    notes = _notes(chosen, training)
    if options["validate"] and not labels:  # a head says nothing
        alive = learner.alive
        del learner, training, parts, state  # the model is opened anew
        progress(0, 1, "validating the adapter")
        given = files["train"], files.get("validation")
        notes["validation"] = validated(Path(job.model), adapter_folder, encoder, *given, seed=job.seed, alive=alive)
        if watched is not None:
            artifact.write_json(watched / "validation.json", notes["validation"])
    return notes


def _given(options: dict[str, Any]) -> list[str]:
    return [name for name in ("train", "validation") if options[name]]


def _start(job: Job, parent: Path | None, labels: Sequence[str]) -> Start:
    options = job.options
    kind = {name: options[name] for name in ("targets", "rslora", "dora", "dtype")}
    return Start(base=Path(job.model), parent=parent, seed=job.seed, device=job.device, labels=tuple(labels), **kind)


def _objective(options: dict[str, Any], learner: Learner, encoded: Encoded, file: Path, row_tokens: int) -> Objective:
    """What is minimized; `file` keeps the log-probabilities of the beginning."""
    if options["method"] in ("supervised", "classify"):
        return Supervised()
    if not file.is_file():
        with torch.no_grad():
            everything = rows(encoded.units, range(len(encoded.units)), row_tokens)
            began = torch.cat([sums(learner.logps(row)[0], row).cpu() for row in everything])
        with artifact.replaced(file) as out:
            torch.save(began, out)
    at_first = torch.load(file, weights_only=True)
    if options["method"] == "kto":
        return KTO(options["beta"], at_first, encoded.good)
    return DPO(options["beta"], at_first)


def _tell(line: dict[str, Any], progress: Progress, watched: Path | None) -> None:
    held_out = "" if line["valid_loss"] is None else f", held-out {line['valid_loss']:.3f}"
    what = f"step {line['step']} of {line['steps']}, loss {line['train_loss']:.3f}{held_out}"
    progress(line["step"], line["steps"], what)
    if watched is not None:
        with (watched / "progress.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _publish(learner: Learner, watched: Path | None, step: int, state: State) -> str | None:
    if watched is None:
        return None
    name = f"step-{step:06d}"
    folder = watched / "checkpoints"
    learner.save(state, folder / name)
    for old in sorted(folder.glob("step-*[0-9]"))[:-KEPT]:
        shutil.rmtree(old)
    return f"checkpoints/{name}"


def _chosen(job: Job, settings: Settings, files: dict[str, Encoded], packed: bool) -> dict[str, Any]:
    """What decides the adapter: the data, and what `auto` became."""
    data = {
        name: {
            "sha256": artifact.digest(Path(job.options[name])),
            "examples": encoded.count,
            "sequences": len(encoded.units),
            "cut": encoded.cut,
        }
        for name, encoded in files.items()
    }
    return {"data": data, **asdict(settings), "packed": packed, "threads": torch.get_num_threads()}


def _notes(chosen: dict[str, Any], training: Training) -> dict[str, Any]:
    course = training.course
    notes: dict[str, Any] = {
        **chosen,
        "steps": course.step,
        "planned_steps": training.steps,
        "trained_tokens": course.tokens,
        "training_seconds": round(course.seconds, 1),
        "train_loss": course.losses[-1],
        "losses": course.losses,
    }
    if course.valid:
        notes |= {"valid": course.valid, "best_step": course.best_step, "ended_early": training.ended_early}
        notes["scores"] = {"valid_loss": course.best_loss, "valid_loss_before": course.valid[0][1]}
    return notes
