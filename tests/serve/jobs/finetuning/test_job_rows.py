"""Jobs in the database, as servers that share it claim, lose and end them."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace

import pytest
from sqlalchemy import insert, select, text

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import finetune_jobs as table
from serve.errors import Conflict, EngineUnavailable, QuotaExceeded
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

    progress.write_text(json.dumps({"step": 1, "steps": 3, "tokens": 10}) + "\n")
    with monkeypatch.context() as down:
        down.setattr(rows, "advance", refuses)
        assert watch.look(3.0)  # a sign of life all the same
    with progress.open("a") as file:
        file.write(json.dumps({"step": 2, "steps": 3, "tokens": 20}) + "\n")
    assert watch.look(2.0)
    state = rows.get("acme", "ftjob-1").state
    assert (state.step, state.tokens, state.seconds) == (2, 20, 5.0)
    events = Notes(rows._registry).events("ftjob-1", after=None, limit=10).rows
    assert [event.message for event in events[:2]] == ["Step 2/3", "Step 1/3"]


@pytest.mark.parametrize(("steps", "told"), [(2, {}), (90, {"ended": True})], ids=["all steps", "early"])
def test_a_job_that_has_trained_says_what_it_does_and_no_longer_when_it_ends(steps, told, servers, tmp_path):
    """It measures what the adapter changed, six minutes of a model of 0.5B: about 0 s were left."""
    rows, _, _ = servers
    watch = _Watch(rows, JobFolder(tmp_path), launched(rows), lambda tokens, seconds: None, threading.Event())
    with (tmp_path / "progress.jsonl").open("a") as progress:
        for step, left, more in ((1, 5.0, {}), (2, 0.0, told)):
            line = {"step": step, "steps": steps, "tokens": 10, "seconds_left": left, **more}
            progress.write(json.dumps(line) + "\n")
            progress.flush()
            assert watch.look(3.0)
            assert rows.get("acme", "ftjob-1").described()["estimated_finish"] == (1005 if left else None)
    events = Notes(rows._registry).events("ftjob-1", after=None, limit=2).rows
    assert [event.message for event in events] == [
        "Training has ended; what the adapter changed is measured", f"Step 2/{steps}",
    ]  # fmt: skip


def test_a_program_that_computes_between_two_steps_is_alive(servers, tmp_path):
    rows, _, _ = servers
    watch = _Watch(rows, JobFolder(tmp_path), launched(rows), lambda tokens, seconds: None, threading.Event())
    assert not watch.look(3.0)
    (tmp_path / "alive").touch()
    assert [watch.look(3.0), watch.look(3.0)] == [True, False]
    os.utime(tmp_path / "alive", (1.0, 1.0))
    assert watch.look(3.0)


def test_a_list_by_metadata_reads_the_jobs_that_say_so_and_no_others(servers, monkeypatch):
    """One look at the database found every job of the tenant before, for each job of the list."""
    rows, _, now = servers
    told = {"a": 'b"c: {', "who": "anna"}
    for i in range(250):
        now[0] += 1
        asked = replace(ASKED, metadata=told if i in (3, 200) else {"a": "b", "x": 'metadata": {"a": "b\\"c: {"'})
        job = Job(f"ftjob-{i}", "acme", Status.SUCCEEDED, now[0], "file-1", None, asked)
        with rows._registry.adding() as connection:
            connection.execute(insert(table).values(rows._values(job)))
    read = []
    job_of = rows._read
    monkeypatch.setattr(rows, "_read", lambda row: read.append(row.id) or job_of(row))
    page = rows.page("acme", after=None, limit=1, metadata=told)
    assert ([job.id for job in page.rows], page.has_more, read) == (["ftjob-200"], True, ["ftjob-200", "ftjob-3"])
    page = rows.page("acme", after="ftjob-200", limit=20, metadata={"who": "anna"})
    assert ([job.id for job in page.rows], page.has_more) == (["ftjob-3"], False)
    assert len(rows.page("acme", after=None, limit=100, metadata={"a": "b"}).rows) == 100
    assert not rows.page("acme", after=None, limit=1, metadata={"model": "base"}).rows
    with rows._registry.reading() as connection:
        query = select(table).where(table.c.tenant == "acme").order_by(table.c.created.desc(), table.c.id.desc())
        plan = " ".join(
            str(row) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}"), {"tenant_1": "acme"})
        )
    assert "ix_finetune_jobs_listed" in plan and "TEMP B-TREE" not in plan


def test_a_tenant_has_so_many_jobs_and_no_more_also_at_their_end(servers, monkeypatch):
    rows, _, _ = servers
    monkeypatch.setattr("serve.adapters.registry.work_table.KEPT", 3)
    for i in range(3):
        rows.add(Job(f"ftjob-{i}", "acme", Status.VALIDATING, 1000.0, "file-1", None, ASKED))
        rows.cancel("acme", f"ftjob-{i}")
    with pytest.raises(QuotaExceeded, match="3 are the most"):
        rows.add(Job("ftjob-4", "acme", Status.VALIDATING, 1000.0, "file-1", None, ASKED))
    rows.add(Job("ftjob-5", "other", Status.VALIDATING, 1000.0, "file-1", None, ASKED))
