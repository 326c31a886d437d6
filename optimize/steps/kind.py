"""A kind of step, whole: what a recipe may say of it, what it needs, where its work is done, what the report says.

Each module below this folder whose name ends with `rules` has one as `STEP`; another package offers its own by an
entry point of the group `loradock.optimize.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimize import recipe
from optimize.options import Step
from optimize.steps.planning import Context, Estimate

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepKind:
    """`work` is the module with `run(job, progress)`, which alone may import torch: it writes `job.folder / "model"`
    (or `adapters/NAME`) and returns notes for the manifest. `refuse` raises Refused before any work.
    """

    options: type[Step]
    work: str
    estimate: Callable[[Any, Context], Estimate]
    refuse: Callable[[Any, Context], None]
    # What the report says of it, from its options and notes.
    sentence: Callable[[Options, Options], str] = lambda options, notes: ""
    # Whether it looks at the model that quality is measured against, and at the text of the evaluation.
    compares: bool = False
    reads_evaluation: bool = False
    # Scores of which the worst counts, where there are several such steps.
    worst: tuple[str, ...] = ()
    # Modules that these options choose, whose code counts too.
    chosen: Callable[[Options], Sequence[str]] = lambda options: ()

    @property
    def name(self) -> str:
        return self.options.name_in_recipes()


def kinds() -> Mapping[str, StepKind]:
    """Every kind of step, by its name."""
    return recipe.step_kinds()
