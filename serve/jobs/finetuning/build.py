"""Fine-tuning as a server has it: over its parts, with the limits of its configuration."""

from __future__ import annotations

from collections.abc import Callable

from serve.adapters.store import Store
from serve.config import Config
from serve.engine.supervisor import Supervisor
from serve.events import Events
from serve.gateway.router import Router
from serve.jobs.batches.files import Files
from serve.jobs.finetuning.admission import Admission
from serve.jobs.finetuning.finetuning import FineTuning
from serve.jobs.finetuning.job_folders import JobFolders
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.job_runner import JobRunner
from serve.jobs.finetuning.metrics import FineTuningMetrics
from serve.jobs.finetuning.objects import Limits, Where
from serve.jobs.finetuning.schedule import JobSchedule, Turns
from serve.jobs.finetuning.trainer import Trainer
from serve.jobs.finetuning.training_process import TrainingProcess
from serve.jobs.finetuning.worker_files import WorkerFiles
from serve.jobs.finetuning.workers import Workers


def build(
    config: Config,
    store: Store,
    router: Router,
    files: Files,
    admission: Admission,
    events: Events,
    max_rank: Callable[[Supervisor], int],
    me: str,
) -> FineTuning:
    """`max_rank` says which rank a base's engine takes at most; `me` is this server's name."""
    fleet, where = router.fleet, Where(config.finetune_on)

    def is_busy() -> bool:
        """Clients need the machine."""
        return sum(base.leases - base.background for base in fleet) > config.finetune_load

    limits = Limits(config.finetune_open, config.finetune_hours)
    rows, turns = JobRows(router.registry, limits, me=me), Turns()
    process = TrainingProcess(is_busy)
    metrics = FineTuningMetrics(process)
    folders = JobFolders(store, rows)
    trainer = Trainer(rows, process, limits.hours, metrics.trained, folders.measure)
    runner = JobRunner(rows, folders, files, process, trainer, admission, fleet, events)
    trains, alone = where is not Where.WORKERS, not config.registry
    schedule = JobSchedule(rows, runner, metrics, alone=alone, turns=turns, trains=trains)
    worker_files = WorkerFiles(folders, files.contents, store, config.max_upload_bytes)
    workers = Workers(rows, runner, worker_files, turns, metrics, taken=where is not Where.HERE, me=me)
    return FineTuning(router, files, rows, runner, schedule, workers, metrics, max_rank)
