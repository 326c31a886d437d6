"""Jobs in the database, as servers that share it claim, lose and end them."""

from __future__ import annotations

import json
import os
import threading

import pytest

from serve.adapters.registry.registry import Registry
from serve.errors import Conflict, EngineUnavailable
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.notes import Notes
from serve.jobs.finetuning.objects import Asked, Job, Limits, Status
from serve.jobs.finetuning.trainer import _Watch

ASKED = Asked("base", "base", "base", "acme/tone", "supervised", {}, 1, "key", "anna")


@pytest.fixture
def servers(tmp_path):
    """The rows as two servers see them, and the time of day."""
    now = [1000.0]
    with Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}") as registry:
        yield *(JobRows(registry, Limits(), me=me, clock=lambda: now[0]) for me in ("first", "second")), now


def launched(rows):
    """A job in training on this server."""
    rows.add(Job("ftjob-1", "acme", Status.VALIDATING, 1000.0, "file-1", None, ASKED))
    assert rows.claim("ftjob-1", 30.0) and rows.validated("ftjob-1", examples=20)
    return rows.launch("ftjob-1")


def admitting(rows):
    """The id of a job whose training has ended on this server."""
    return rows.admit(launched(rows).id).id


def test_a_job_is_not_cancelled_while_its_model_is_admitted_and_is_once_nobody_admits_it(servers):
    rows, _, _ = servers
    id = admitting(rows)
    with pytest.raises(Conflict, match="its model is being admitted"):
        rows.cancel("acme", id)
    rows.release(id)  # the engine, say, is gone
    assert rows.cancel("acme", id).status is Status.CANCELLED


def test_a_job_that_another_server_trains_again_is_cancelled(servers):
    rows, others, now = servers
    id = admitting(rows)
    now[0] += 31
    assert others.claim(id, 30.0) and others.launch(id)
    assert others.cancel("acme", id).status is Status.CANCELLED
    assert rows.claim(id, 30.0) is None and rows.admit(id) is None


def test_progress_that_the_registry_did_not_take_is_written_down_the_next_time(servers, tmp_path, monkeypatch):
    rows, _, _ = servers
    watch = _Watch(rows, JobFolder(tmp_path), launched(rows), lambda tokens, seconds: None, threading.Event())
    progress = tmp_path / "progress.jsonl"

    def refuses(*_):
        raise EngineUnavailable("the registry did not take the change")

    progress.write_text(json.dumps({"step": 1, "steps": 2, "tokens": 10}) + "\n")
    with monkeypatch.context() as down:
        down.setattr(rows, "advance", refuses)
        assert watch.look(3.0)  # a sign of life all the same
    with progress.open("a") as file:
        file.write(json.dumps({"step": 2, "steps": 2, "tokens": 20}) + "\n")
    assert watch.look(2.0)
    state = rows.get("acme", "ftjob-1").state
    assert (state.step, state.tokens, state.seconds) == (2, 20, 5.0)
    events = Notes(rows._registry).events("ftjob-1", after=None, limit=10).rows
    assert [event.message for event in events[:2]] == ["Step 2/2", "Step 1/2"]


def test_a_program_that_computes_between_two_steps_is_alive(servers, tmp_path):
    rows, _, _ = servers
    watch = _Watch(rows, JobFolder(tmp_path), launched(rows), lambda tokens, seconds: None, threading.Event())
    assert not watch.look(3.0)
    (tmp_path / "alive").touch()
    assert [watch.look(3.0), watch.look(3.0)] == [True, False]
    os.utime(tmp_path / "alive", (1.0, 1.0))
    assert watch.look(3.0)
