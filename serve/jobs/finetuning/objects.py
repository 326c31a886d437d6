"""Jobs, their events and checkpoints as OpenAI's API shows them (https://platform.openai.com/docs/api-reference/fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# The purpose of the file of what each step measured.
RESULTS = "fine-tune-results"
METHODS = ("supervised", "dpo")


class Status(StrEnum):
    """Where a job is."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


# What a server works on, and what is not at its end.
ACTIVE = (Status.VALIDATING, Status.QUEUED, Status.RUNNING)
OPEN = (*ACTIVE, Status.PAUSED)
ENDS = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Where(StrEnum):
    """Which machines train."""

    HERE = "here"
    WORKERS = "workers"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job is to do. `name` is the full name of the adapter that it makes a version of; `parent` the full name
    and version of the adapter that it goes on from, and `key` the id of the key that made it."""

    model: str
    base: str
    base_model: str
    name: str
    method: str
    hyperparameters: Mapping[str, Any]
    seed: int
    key: str
    who: str
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    parent: str = ""
    parent_digest: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """How far a job is. `launches` counts starts of its process since its last step; times are seconds since 1970."""

    examples: int = 0
    base_digest: str = ""
    data_digest: str = ""
    launches: int = 0
    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finishes: float | None = None
    finished: float | None = None
    # Its training has ended, and its model is on its way into the registry.
    admitting: bool = False
    settled: Mapping[str, Any] = field(default_factory=dict)  # hyperparameters, once they are numbers
    fine_tuned_model: str | None = None
    result_file: str | None = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the database has it."""

    id: str
    tenant: str
    status: Status
    created: float
    training_file: str
    validation_file: str | None
    asked: Asked
    state: State = State()

    def described(self) -> dict[str, Any]:
        """For the API."""
        asked, state = self.asked, self.state
        hyperparameters = {**asked.hyperparameters, **state.settled}
        running = self.status is Status.RUNNING
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "model": asked.model,
            "created_at": int(self.created),
            "finished_at": _whole(state.finished),
            "fine_tuned_model": state.fine_tuned_model,
            "organization_id": self.tenant,
            "result_files": [state.result_file] if state.result_file else [],
            "status": self.status.value,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "hyperparameters": hyperparameters,
            "method": {"type": asked.method, asked.method: {"hyperparameters": hyperparameters}},
            "trained_tokens": state.tokens if self.status is Status.SUCCEEDED else None,
            "error": state.error,
            "user_provided_suffix": asked.suffix,
            "seed": asked.seed,
            "estimated_finish": _whole(state.finishes) if running else None,
            "integrations": [],
            "metadata": asked.metadata,
        }


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job; `number` counts them, and `data` is what a step measured."""

    job: str
    number: int
    when: float
    level: str
    message: str
    data: Mapping[str, Any] | None = None

    def described(self) -> dict[str, Any]:
        return {
            "id": f"ftevent-{self.job.removeprefix('ftjob-')}-{self.number}",
            "object": "fine_tuning.job.event",
            "created_at": int(self.when),
            "level": self.level,
            "message": self.message,
            "type": "message" if self.data is None else "metrics",
            "data": self.data,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The adapter at the end of an epoch, as a version that answers."""

    job: str
    step: int
    when: float
    model: str
    metrics: Mapping[str, float]

    def described(self) -> dict[str, Any]:
        return {
            "id": f"ftckpt-{self.job.removeprefix('ftjob-')}-{self.step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(self.when),
            "fine_tuned_model_checkpoint": self.model,
            "fine_tuning_job_id": self.job,
            "metrics": self.metrics,
            "step_number": self.step,
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may have trained: jobs that are not at their end, and hours that one trains."""

    open: int = 4
    hours: float = 24.0


def _whole(when: float | None) -> int | None:
    return None if when is None else int(when)
