"""Fine-tuning as a whole: jobs are made, cancelled, paused and resumed here, and run by `JobSchedule`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.adapters.adapter import Adapter
from serve.auth.auth import Caller
from serve.engine.supervisor import Supervisor
from serve.errors import BadRequest, Conflict, NotFound, QuotaExceeded
from serve.gateway.router import Router
from serve.jobs.batches.batches import check_metadata
from serve.jobs.batches.files import Files
from serve.jobs.batches.objects import EXAMPLES
from serve.jobs.finetuning.admission import public_name
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.job_runner import JobRunner
from serve.jobs.finetuning.metrics import FineTuningMetrics
from serve.jobs.finetuning.notes import Notes
from serve.jobs.finetuning.objects import METHODS, Asked, Job, Status
from serve.jobs.finetuning.schedule import JobSchedule
from serve.jobs.finetuning.workers import Workers
from serve.names import check_adapter_name, check_name, full_name, shown, tenant_of

# Of an adapter that is trained from nothing.
RANK = 16
_AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


class FineTuning:
    """`max_rank` says which rank a base's engine takes at most."""

    def __init__(
        self,
        router: Router,
        files: Files,
        rows: JobRows,
        runner: JobRunner,
        schedule: JobSchedule,
        workers: Workers,
        metrics: FineTuningMetrics,
        max_rank: Callable[[Supervisor], int],
    ) -> None:
        self._router = router
        self._registry = router.registry
        self._fleet = router.fleet
        self._files = files
        self.rows = rows
        self.notes = Notes(router.registry)
        self.runner = runner
        self.schedule = schedule
        self.workers = workers
        self.metrics = metrics
        self._max_rank = max_rank

    def create(
        self,
        caller: Caller,
        *,
        model: str,
        training_file: str,
        validation_file: str | None,
        suffix: str | None,
        method: str,
        hyperparameters: Mapping[str, Any],
        seed: int | None,
        metadata: Mapping[str, str] | None,
        id: str | None = None,
    ) -> Job:
        """A new job of the caller's; BadRequest for what cannot be one. Blocks.

        `id` is that of a job that the server makes for itself, by which it finds it again; a client's is drawn.
        """
        self._check_trainable()
        if method not in METHODS:
            raise BadRequest(f"method.type takes {' or '.join(METHODS)} here, not {shown(method)}", param="method.type")
        check_metadata(metadata or {})
        id = id or f"ftjob-{secrets.token_hex(12)}"
        parent, base = self._model(model, caller)
        name = self._name(caller, suffix, parent, base, id)
        self._check_quota(caller, name)
        for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
            self._check_file(caller, file, param)
        if validation_file == training_file:
            same = "training_file and validation_file are one file: hold out examples of their own"
            raise BadRequest(same, param="validation_file")
        job = Job(
            id,
            caller.tenant,
            Status.VALIDATING,
            time.time(),
            training_file,
            validation_file,
            Asked(
                model=model,
                base=base.name,
                base_model=base.model,
                name=name,
                method=method,
                hyperparameters=self._settled(hyperparameters, method, parent, base),
                seed=secrets.randbelow(1 << 31) if seed is None else seed,
                key=caller.key,
                who=caller.name,
                suffix=suffix,
                metadata=metadata,
                parent=public_name(parent, caller.tenant) if parent else "",
                parent_digest=parent.digest if parent else "",
            ),
        )
        self.rows.add(job)
        return job

    def cancel(self, tenant: str, id: str) -> Job:
        """Blocks."""
        job = self.rows.cancel(tenant, id)
        self.runner.ended(job, Status.CANCELLED)
        return job

    def _check_trainable(self) -> None:
        """BadRequest where nothing would train a job."""
        if not self.rows.limits.open:
            raise BadRequest("this server trains nothing: its operator set finetune_open to 0", param="model")
        if self.schedule.trains and (package := self.runner.process.missing_package()):
            raise BadRequest(
                f"this server cannot train: {package} is not installed in its environment. Its operator installs it "
                f"(`pip install {package}`), or has other machines train (`--finetune-on workers`)",
                param="model",
            )

    def _model(self, model: str, caller: Caller) -> tuple[Adapter | None, Supervisor]:
        """The adapter to go on from, if it is one, and the base."""
        adapter = self._router.resolve(model, caller)
        if adapter is None:
            return None, self._fleet.get(model)
        if tenant_of(adapter.name) != caller.tenant:
            raise BadRequest(
                f"{shown(model)} is another tenant's: it may be asked, and nobody else trains on from it; take a base "
                "or an adapter of your own",
                param="model",
            )
        return adapter, self._fleet.of(adapter.name)

    def _name(self, caller: Caller, suffix: str | None, parent: Adapter | None, base: Supervisor, id: str) -> str:
        """Of the adapter that the job makes a version of."""
        if suffix is None and parent:
            return parent.name
        try:
            short = check_name(suffix) if suffix is not None else f"ft-{id.removeprefix('ftjob-')[:8]}"
            name = check_adapter_name(full_name(caller.tenant, short), [base.name for base in self._fleet])
        except (BadRequest, Conflict) as bad:
            raise type(bad)(f"suffix is the adapter's name here: {bad.message}", param="suffix") from bad
        if (now := self._registry.moved_to(name)) is not None:
            raise Conflict(f"the adapter {shown(suffix)} is called {now} now: take that as suffix", param="suffix")
        if name in self._registry and self._fleet.of(name) is not base:
            raise Conflict(
                f"the versions of {shown(suffix)} run on {self._fleet.of(name).name}: take another suffix for one on "
                f"{base.name}",
                param="suffix",
            )
        return name

    def _check_quota(self, caller: Caller, name: str) -> None:
        """What would be refused after hours of training is refused now."""
        most = caller.limits.adapters
        mine = {adapter.name for adapter in self._registry.adapters() if adapter.tenant == caller.tenant}
        if most is not None and len(mine | {name}) > most:
            raise QuotaExceeded(f"this key's tenant may keep {most} adapters: delete one that nobody uses")

    def _check_file(self, caller: Caller, id: str | None, param: str) -> None:
        if id is None:
            return
        try:
            file = self._files.rows.get(caller.tenant, id)
        except NotFound as missing:
            raise BadRequest(missing.message, param=param) from missing
        if file.purpose != EXAMPLES:
            raise BadRequest(f"{file.id} has the purpose `{file.purpose}`: send a file with `fine-tune`", param=param)

    def _settled(
        self, asked: Mapping[str, Any], method: str, parent: Adapter | None, base: Supervisor
    ) -> dict[str, Any]:
        """The hyperparameters with what they are by default, in so far as they are known before the examples are."""
        settled = {**_AUTO, **asked}
        if "beta" in settled and method != "dpo":
            raise BadRequest("beta is a hyperparameter of the method dpo", param="method")
        if parent:
            if given := [name for name in ("rank", "alpha") if name in asked]:
                raise BadRequest(f"{given[0]} is that of the adapter to go on from: leave it out", param="method")
            return settled
        most = self._max_rank(base)
        rank = settled.setdefault("rank", min(RANK, most))
        if rank > most:
            raise BadRequest(f"rank {rank} is above the {most} that this server takes", param="method")
        return settled
