"""A candidate: examples are gathered and split, and a fine-tuning job of the tenant's goes on from what is live."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.adapters.adapter import Adapter
from serve.auth.auth import Auth
from serve.errors import BadRequest, Conflict, NotFound
from serve.jobs.batches.files import Files
from serve.jobs.finetuning.finetuning import FineTuning
from serve.jobs.finetuning.objects import ENDS, Status
from serve.loop.deletions import Deleted, Deletions
from serve.loop.examples import Gather, Gathered, Short, Training, bounded, mixed, read, split
from serve.loop.likelihood import Example
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Loop
from serve.names import short_name, tenant_of
from serve.rollout.loop_policy import LoopPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that trains, and the examples that its result will be asked."""

    job: str
    held_out: str
    text: str
    evidence: dict[str, Any]


class Candidates:
    """`gather` builds examples from traffic."""

    def __init__(
        self,
        rows: LoopRows,
        jobs: FineTuning,
        files: Files,
        auth: Auth,
        gather: Gather,
    ) -> None:
        self._rows = rows
        self._jobs = jobs
        self._files = files
        self._auth = auth
        self.gather = gather
        self.deletions = Deletions()

    async def prepare(self, loop: Loop, live: Adapter, policy: LoopPolicy, now: float) -> Prepared:
        """Gather, split, and begin the job; Short while there are too few examples."""
        with self.deletions.watched(tenant_of(loop.name)) as deleted:
            gathered = await self.gather(
                loop.name,
                since=max(loop.state.trained_until, loop.state.traffic_since),
                until=now,
                held_out=policy.held_out,
                seed=0,  # the same split at every try: what was held out once is never trained on
            )
            prepared = await asyncio.to_thread(self._prepare, loop, live, policy, gathered, deleted)
        self._jobs.schedule.wake()
        return prepared

    def _prepare(self, loop: Loop, live: Adapter, policy: LoopPolicy, gathered: Gathered, deleted: Deleted) -> Prepared:
        new, held_out = list(gathered.train), bounded(gathered.held_out)
        _enough(len(new), held_out, policy)
        gone = self._rows.references.deleted(deleted.tenant)  # before this; what goes meanwhile is in `deleted`
        old = [example for example in self._old(live) if example.digest not in gone]
        kept = self._references(loop, live, old, policy, deleted)
        training = mixed(new, held_out, old, kept, seed=loop.state.number)
        with self.deletions.writing:
            training = training.without(deleted.has)
            _enough(sum(not deleted.has(one) for one in new), training.held_out, policy)
            return self._written(loop, live, training, gathered)

    def _written(self, loop: Loop, live: Adapter, training: Training, gathered: Gathered) -> Prepared:
        evidence = {
            **gathered.evidence,
            "new": training.new,
            "replayed": training.replayed,
            "held_out": len(training.held_out),
            "live": f"v{live.version}",
        }
        job = job_of(loop)
        try:
            self._jobs.rows.get(tenant_of(loop.name), job)
        except NotFound:
            self._begin(loop, live, training, job)
        held = self._rows.references.hold_out(loop, training.held_out)
        text = f"{job} on {training.new} new examples and {training.replayed} old ones, from v{live.version}"
        return Prepared(job, held, text, evidence)

    def _old(self, live: Adapter) -> list[Example]:
        """What the live version was trained on, if a job here did that and its file is still there."""
        id = (live.checks or {}).get("fine_tuning_job")
        if not isinstance(id, str):
            return []
        try:
            job = self._jobs.rows.get(tenant_of(live.name), id)
            return read(self._files.contents.path(job.training_file))
        except (NotFound, BadRequest, OSError) as gone:
            log.info("what %s was trained on is not replayed: %s", live.tag, gone)
            return []

    def _references(
        self, loop: Loop, live: Adapter, old: list[Example], policy: LoopPolicy, deleted: Deleted
    ) -> list[Example]:
        """Everything that earlier references hold; a first one is made where there is none."""
        references = self._rows.references.kept(loop)
        if not references:
            with self.deletions.writing:
                there = [example for example in old if not deleted.has(example)]
                if first := split(there, policy.held_out, policy.needed):
                    self._rows.references.hold_out(loop, first, label=f"training of v{live.version}")
            references = self._rows.references.kept(loop)
        return [example for one in references for example in self._rows.references.examples(one.id)]

    def _begin(self, loop: Loop, live: Adapter, training: Training, id: str) -> None:
        tenant = tenant_of(loop.name)
        caller = self._auth.standing(tenant)
        short = short_name(loop.name, tenant)
        file = self._files.written(caller, f"loop-try-{loop.state.number}.jsonl", training.lines())
        self._jobs.create(
            caller,
            model=f"{short}@v{live.version}",
            training_file=file.id,
            validation_file=None,
            suffix=None,
            method="supervised",
            hyperparameters={},
            seed=loop.state.number,
            metadata={"loop": loop.id, "try": str(loop.state.number)},
            id=id,
        )

    async def trained(self, loop: Loop) -> int | None:
        """The number of the version that the job made; None while it goes on. BadRequest if it made none."""
        job = await asyncio.to_thread(self._jobs.rows.get, tenant_of(loop.name), loop.state.job)
        if job.status not in ENDS:
            return None
        model = job.state.fine_tuned_model
        if job.status is not Status.SUCCEEDED or model is None:
            why = (job.state.error or {}).get("message", "")
            raise BadRequest(f"{job.id} is {job.status.value}{': ' if why else ''}{why}")
        return int(model.rpartition("@v")[2])

    def give_up(self, loop: Loop) -> None:
        """The try is over: its job need not go on. Blocks."""
        if not loop.state.job:
            return
        try:
            self._jobs.cancel(tenant_of(loop.name), loop.state.job)
        except (Conflict, NotFound):
            return  # it is at its end
        self._jobs.schedule.wake()


def job_of(loop: Loop) -> str:
    """The id of the job that trains for this try: a server that starts again finds it, and no client can make one."""
    return f"ftjob-{hashlib.sha256(f'{loop.id} {loop.state.number}'.encode()).hexdigest()[:24]}"


def _enough(new: int, held_out: Sequence[Example], policy: LoopPolicy) -> None:
    """Short if these are too few examples."""
    examples, clusters = new + len(held_out), len({example.counted_as for example in held_out})
    if examples < policy.min_examples or clusters < policy.needed:
        askers = "" if clusters == len(held_out) else f" of {clusters} askers"
        raise Short(
            f"{examples} of {policy.min_examples} examples of new traffic, {len(held_out)} held out{askers} of the "
            f"{policy.needed} that the gate needs at least"
        )
