"""Which work a server takes: what it can read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from serve.jobs.batches.schedule import BatchSchedule
from serve.jobs.finetuning.job_runner import Kind
from serve.jobs.finetuning.objects import Status
from serve.jobs.finetuning.schedule import JobSchedule


class Rows:
    """One piece of work, and who has the claim of it."""

    def __init__(self, work):
        self.work, self.claimed = work, False

    def open(self):
        return [self.work]

    def claim(self, id, seconds):
        self.claimed = True
        return self.work

    def release(self, id=None):
        self.claimed = False

    def sweep(self): ...


def batches(rows, runner, contents):
    table = SimpleNamespace(totals=lambda: (0, 0))
    files = SimpleNamespace(rows=table, contents=contents, sweep=lambda: None)
    answers = SimpleNamespace(sweep=lambda: None)
    return BatchSchedule(rows, files, answers, runner, runner.metrics, alone=False)


def jobs(rows, runner, contents):
    runner.can_read = lambda job: contents.has(job.training_file) and contents.has(job.validation_file)
    runner.kind = lambda job: Kind.TRAIN
    return JobSchedule(rows, runner, runner.metrics, alone=False)


@pytest.mark.parametrize("schedule_of", [batches, jobs])
async def test_what_lies_on_another_servers_disk_is_left_to_that_server(schedule_of):
    begun, there = [], {"file-1"}
    go = asyncio.Event()

    async def run(work):
        await go.wait()
        begun.append(work)

    metrics = SimpleNamespace(see=lambda found: None, keeps=lambda *totals: None)
    folders = SimpleNamespace(sweep=lambda kept: None)
    runner = SimpleNamespace(run=run, folders=folders, metrics=metrics)
    contents = SimpleNamespace(has=there.__contains__)
    row = {"id": "work-1", "tenant": "acme", "created": 0.0, "expires": 1e12, "status": Status.QUEUED}
    row |= {"input_file": "file-2", "training_file": "file-1", "validation_file": "file-2"}
    rows, clock = Rows(SimpleNamespace(**row)), [1000.0]
    schedule = schedule_of(rows, runner, contents)
    schedule._clock = lambda: clock[0]
    await schedule.round()
    assert not schedule._working and not rows.claimed
    there.add("file-2")
    await schedule.round()
    assert not schedule._working, "it is looked at again after a pause"
    clock[0] += 31
    await schedule.round()
    (work, task) = schedule._working["work-1"]
    go.set()
    await task
    assert begun == [work] and not rows.claimed
