"""What this machine takes for a model, measured in a process like a step's."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from optimize import processor
from optimize.errors import OptimizeError
from optimize.job import Job
from optimize.options import plain
from optimize.pipeline.child import Child
from optimize.pipeline.resident import Resident
from optimize.recipe import Recipe
from optimize.steps.merge.rules import Merge
from optimize.steps.planning import Machine
from optimize.steps.prune.rules import Prune
from optimize.steps.tune.rules import Tune


def measured(recipe: Recipe, model: Path, resident: Resident) -> Machine:
    """The machine with the model in a folder; a server's where that cannot be measured, whose step says why then."""
    if processor.gpu() is not None:
        return Machine()
    with TemporaryDirectory(prefix="loradock-probe-") as folder:
        trained = next((plain(step) for step in recipe.steps if isinstance(step, Tune)), {})
        zeros = next((plain(step) for step in recipe.steps if isinstance(step, Prune) and step.zeros), {})
        options = {
            "tune": trained, "zeros": zeros, "merges": any(isinstance(step, Merge) for step in recipe.steps),
            "format": recipe.export.format, "precision": recipe.export.precision,
        }  # fmt: skip
        job = Job(
            kind="probe", options=options, model=str(model), base="", reference="", adapters=dict(recipe.adapters),
            originals={}, calibration=recipe.calibration, evaluate=recipe.evaluate, seed=recipe.seed,
            target=recipe.target, out=folder,
        )  # fmt: skip
        try:
            notes = Child(Path(folder), sys.maxsize, lambda *_: None, {}, resident).run(job)
        except OptimizeError as error:
            return Machine(note=f"this machine was not measured, and times are those of another ({error.message})")
    return Machine(**{field.name: notes[field.name] for field in fields(Machine) if field.name in notes})
