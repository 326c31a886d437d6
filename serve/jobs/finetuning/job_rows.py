"""Jobs in the registry's database, where every server that shares it looks. All methods block.

One server at a time has the claim of a job, and only with it the job goes on. A job that was cancelled or paused is
nobody's: whoever runs it notices when it renews its claim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, delete, update

from serve.adapters.registry.tables import finetune_jobs as table
from serve.adapters.registry.tables import finetune_notes as notes_table
from serve.adapters.registry.work_table import UNCLAIMED, Page, WorkTable
from serve.errors import Conflict, NotFound
from serve.jobs.batches.file_rows import put
from serve.jobs.batches.objects import StoredFile
from serve.jobs.finetuning.notes import add_checkpoint, add_event
from serve.jobs.finetuning.objects import ACTIVE, ENDS, OPEN, Asked, Checkpoint, Job, State, Status
from serve.names import shown


class JobRows(WorkTable[Job]):
    """The table of jobs."""

    table = table
    what = "fine-tuning jobs"
    worked_on = ACTIVE
    not_ended = OPEN
    under_way = "fine-tuning jobs that are not at their end"
    limit_code = "fine_tuning_limit_exceeded"

    def of(self, me: str) -> JobRows:
        """These rows as `me` claims and changes them."""
        return JobRows(self._registry, self.limits, me=me, clock=self._clock)

    def _values(self, job: Job) -> dict[str, Any]:
        plain = ("id", "tenant", "created", "training_file", "validation_file")
        return {
            **{name: getattr(job, name) for name in plain},
            "status": job.status.value,
            "asked": json.dumps(asdict(job.asked)),
            "state": json.dumps(asdict(job.state)),
        }

    def _read(self, row: Row[Any]) -> Job:
        return Job(
            row.id,
            row.tenant,
            Status(row.status),
            row.created,
            row.training_file,
            row.validation_file,
            # What a later version knows more of a job is passed over.
            msgspec.json.decode(row.asked, type=Asked),
            msgspec.json.decode(row.state, type=State),
        )

    def _missing(self, id: str) -> NotFound:
        return NotFound(f"Could not find fine tune: {shown(id)}", code="fine_tune_not_found", param="id")

    def _after_adding(self, connection: Connection, job: Job) -> None:
        add_event(connection, job.id, self._clock(), f"Created fine-tuning job: {job.id}")
        files = " and ".join(filter(None, (job.training_file, job.validation_file)))
        add_event(connection, job.id, self._clock(), f"Validating training file: {files}")

    def _before_forgetting(self, connection: Connection, ids: Select[Any]) -> None:
        connection.execute(delete(notes_table).where(notes_table.c.job.in_(ids)))

    # For clients

    def page(
        self, tenant: str, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """A tenant's jobs, the latest first, from behind the job `after`; those alone whose metadata says all this."""
        if not metadata:
            return self._page(tenant, after, limit)
        # As `_values` spells it. A text that says so elsewhere, or in capitals, is told apart by `fits`.
        spelled = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metadata.items()]
        says = [table.c.asked.contains(text, autoescape=True) for text in spelled]

        def fits(job: Job) -> bool:
            return metadata.items() <= (job.asked.metadata or {}).items()

        return self._page(tenant, after, limit, *says, fits=fits)

    def cancel(self, tenant: str, id: str) -> Job:
        """It ends here, whatever its process does; Conflict if it is at its end already."""
        return self._asked(tenant, id, "cancel", OPEN, Status.CANCELLED, "Fine-tuning job was cancelled")

    def pause(self, tenant: str, id: str) -> Job:
        return self._asked(tenant, id, "pause", ACTIVE, Status.PAUSED, "Fine-tuning job was paused")

    def resume(self, tenant: str, id: str) -> Job:
        return self._asked(tenant, id, "resume", (Status.PAUSED,), Status.QUEUED, "Fine-tuning job was resumed")

    def _asked(self, tenant: str, id: str, verb: str, taken: tuple[Status, ...], status: Status, message: str) -> Job:
        with self._registry.adding() as connection:
            job = self._own(connection, tenant, id, lock=True)
            if job.status not in taken:
                raise Conflict(f"Cannot {verb} a job with status '{job.status}'.", param="id")
            if job.state.admitting and self._is_claimed(connection, id):
                raise Conflict(
                    f"Cannot {verb} this job: its training has ended, and its model is being admitted; look again in "
                    "some seconds",
                    param="id",
                )
            if status is Status.QUEUED and not job.state.examples:
                status = Status.VALIDATING
            return self._reach(connection, job, status, message)

    # What the server with the claim writes; None, if the claim is another's by now or the job was stopped

    def validated(self, id: str, **state: Any) -> Job | None:
        """Its files are in order."""
        message = "Files validated, moving job to queued state"
        return self._go_on(id, Status.QUEUED, message, **state)

    def launch(self, id: str) -> Job | None:
        """Its process is about to start, for the first time or again; also where another server had its result."""
        with self._registry.adding() as connection:
            if (job := self._claimed(connection, id)) is None:
                return None
            message = "Fine-tuning job started" if job.status is not Status.RUNNING else ""
            more = {"launches": job.state.launches + 1, "admitting": False}
            return self._reach(connection, job, Status.RUNNING, message, **more)

    def note(self, id: str, message: str, level: str = "info") -> None:
        """An event."""
        with self._registry.adding() as connection:
            if self._claimed(connection, id):
                add_event(connection, id, self._clock(), message, level)

    def advance(
        self, id: str, lines: Sequence[Mapping[str, Any]], seconds: float, settled: Mapping[str, Any]
    ) -> Job | None:
        """What steps measured since the last time, so many seconds of running, and the hyperparameters as numbers."""
        with self._registry.adding() as connection:
            if (job := self._claimed(connection, id)) is None:
                return None
            changed: dict[str, Any] = {"seconds": job.state.seconds + seconds, "settled": dict(settled)}
            if lines:
                last, now = lines[-1], self._clock()
                new = [line for line in lines if line["step"] > job.state.step]
                for line in new:
                    _add_step(connection, id, now, line)
                # Fewer steps may be enough; a worker of an earlier release does not say so.
                ended = last.get("ended")
                trained = last["step"] >= last["steps"] if ended is None else ended is True
                left = None if trained else last.get("seconds_left")
                if new and trained:
                    add_event(connection, id, now, "Training has ended; what the adapter changed is measured")
                changed |= {
                    "step": max(job.state.step, last["step"]), "steps": last["steps"],
                    "tokens": last.get("tokens") or 0, "finishes": None if left is None else now + left,
                }  # fmt: skip
                changed |= {"launches": 0} if new else {}
            return self._reach(connection, job, Status.RUNNING, "", **changed)

    def admit(self, id: str) -> Job | None:
        """Its training has ended: from now on it is neither cancelled nor paused."""
        return self._go_on(id, Status.RUNNING, "", admitting=True)

    def fail(self, id: str, code: str, message: str, param: str | None = None, *, also: tuple[str, ...] = ()) -> bool:
        """It ends with this error; `also` are further ones, as events."""
        with self._registry.adding() as connection:
            if (job := self._claimed(connection, id)) is None:
                return False
            for sentence in (message, *also):
                add_event(connection, id, self._clock(), sentence, "error")
            error = {"code": code, "message": message, "param": param}
            self._reach(connection, job, Status.FAILED, "", error=error, admitting=False)
            return True

    def succeed(
        self, id: str, model: str, result: StoredFile, checkpoints: list[Checkpoint], settled: Mapping[str, Any]
    ) -> bool:
        """Its model answers, and its results are a file."""
        with self._registry.adding() as connection:
            if (job := self._claimed(connection, id)) is None:
                return False
            put(connection, result)
            for checkpoint in checkpoints:
                add_checkpoint(connection, checkpoint)
            add_event(connection, id, self._clock(), f"New fine-tuned model created: {model}")
            self._reach(
                connection,
                job,
                Status.SUCCEEDED,
                "The job has successfully completed",
                fine_tuned_model=model,
                result_file=result.id,
                settled=dict(settled),
                admitting=False,
            )
            return True

    def _go_on(self, id: str, status: Status, message: str, **state: Any) -> Job | None:
        with self._registry.adding() as connection:
            if (job := self._claimed(connection, id)) is None:
                return None
            return self._reach(connection, job, status, message, **state)

    def _reach(self, connection: Connection, job: Job, status: Status, message: str, **state: Any) -> Job:
        if status in ENDS:
            state["finished"] = self._clock()
        job = replace(job, status=status, state=replace(job.state, **state))
        values: dict[str, Any] = {"status": status.value, "state": json.dumps(asdict(job.state))}
        if status not in ACTIVE:
            values |= UNCLAIMED
        connection.execute(update(table).where(table.c.id == job.id).values(values))
        if message:
            add_event(connection, job.id, self._clock(), message)
        return job


def _add_step(connection: Connection, id: str, now: float, line: Mapping[str, Any]) -> None:
    """A step as an event; of a long training not each."""
    step, steps = line["step"], line["steps"]
    if step % max(1, steps // 100) and step != steps and line.get("valid_loss") is None:
        return
    loss = line.get("train_loss")
    said = f"Step {step}/{steps}: training loss={loss:.2f}" if loss is not None else f"Step {step}/{steps}"
    if line.get("valid_loss") is not None:
        said += f", validation loss={line['valid_loss']:.2f}"
    measured = {**metrics_of(line), "total_steps": steps}
    add_event(connection, id, now, said, data=measured)


def metrics_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a step measured, under OpenAI's names."""
    names = {
        "step": "step",
        "train_loss": "train_loss",
        "train_mean_token_accuracy": "train_accuracy",
        "full_valid_loss": "valid_loss",
        "full_valid_mean_token_accuracy": "valid_accuracy",
    }
    return {name: line[ours] for name, ours in names.items() if line.get(ours) is not None}
