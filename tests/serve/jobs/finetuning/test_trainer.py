"""What a training has done is written down, also when that fails at first."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

from serve.errors import EngineUnavailable, QuotaExceeded
from serve.jobs.finetuning import trainer
from serve.jobs.finetuning.job_folder import JobFolder


class Rows:
    def __init__(self, failures):
        self.failures, self.steps = failures, []

    def advance(self, id, lines, seconds, settled):
        if self.failures:
            self.failures -= 1
            raise EngineUnavailable("the server is away")
        self.steps += [line["step"] for line in lines]
        return SimpleNamespace(id=id, state=SimpleNamespace(step=2, tokens=20, settled={"n_epochs": 1}))


def test_last_steps_are_written_down_though_the_server_was_away(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(JobFolder, "adapter", tmp_path)
    (tmp_path / "progress.jsonl").write_text(
        "".join(json.dumps({"step": n, "steps": 2, "tokens": 10 * n, "loss": 1.0}) + "\n" for n in (1, 2))
    )
    job = SimpleNamespace(id="ftjob-1", state=SimpleNamespace(step=0, tokens=0, settled={"n_epochs": 1}))
    rows = Rows(failures=2)
    assert trainer.Trainer(rows, None, 1.0).run(job, JobFolder(tmp_path), threading.Event())
    assert rows.steps == [1, 2]


def test_a_training_whose_tenant_has_no_room_for_its_checkpoints_ends(tmp_path):
    """The process would write on; it is the ledger that says how much there may be."""
    asked = []

    def full(job):
        asked.append(job)
        raise QuotaExceeded("this tenant's training has 10 bytes", code="byte_limit_exceeded")

    state = SimpleNamespace(step=0, tokens=0, launches=1, seconds=0.0, settled={"n_epochs": 1})
    job = SimpleNamespace(id="ftjob-1", state=state)

    class Process:
        def run(self, folder, stop, look, seconds):
            look(trainer.WRITE_SECONDS / 2)
            assert not asked, "not more often than progress is written down"
            look(trainer.WRITE_SECONDS)
            raise AssertionError("it goes on")

    rows = Rows(failures=0)
    rows.launch = lambda id: job
    training = trainer.Trainer(rows, Process(), 1.0, measure=full)
    with pytest.raises(trainer.Failed, match="The training was ended: this tenant's training has 10 bytes") as failed:
        training.run(job, JobFolder(tmp_path), threading.Event())
    assert failed.value.code == "byte_limit_exceeded"
