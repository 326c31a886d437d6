"""The results of a run: its finished steps, the scores and the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.pipeline.gate import Verdict, judges
from optimize.pipeline.plan import Plan
from optimize.recipe import Recipe
from optimize.steps.merge.rules import Merge


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step: its folder and its notes."""

    kind: str
    options: dict[str, Any]
    folder: Path
    notes: dict[str, Any]
    seconds: float
    redone: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the manifest and the report show."""

    recipe: Recipe
    plan: Plan
    done: list[Done]
    scores: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def judged(self) -> bool:
        """Whether the recipe has a gate at all."""
        return judges(self.recipe.gate)

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "**not passed**"
        return "passed" if self.judged else "**not judged**, the recipe gives no bounds"

    @property
    def original(self) -> str:
        """What quality is measured against: adapters that were merged are in it."""
        merged = [name for step in self.recipe.steps if isinstance(step, Merge) for name in step.adapters]
        return " + ".join(["original", *merged])

    @property
    def name(self) -> str:
        return Path(self.recipe.output).name or "export"
