"""Answers of batches in files: none is lost and none comes twice, whatever is killed, and another server finds them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from sqlalchemy import insert

from serve.adapters.byte_ledger import Bound, ByteLedger, Kind
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import batch_answers
from serve.adapters.shared_store import SharedStore
from serve.errors import EngineUnavailable, QuotaExceeded
from serve.jobs.batches import answers as module
from serve.jobs.batches.answers import AnswerFiles
from serve.jobs.batches.batch_rows import BatchRows
from tests.serve.jobs.batches.test_batch_rows import LIMITS, answer, made, running


@pytest.fixture
def registry(tmp_path):
    with Registry(f"sqlite:///{tmp_path}/registry.sqlite") as registry:
        yield registry


@pytest.fixture
def rows(registry):
    return BatchRows(registry, LIMITS, me="one", clock=lambda: 1000.0)


@pytest.fixture
def ledger(tmp_path):
    return ByteLedger(tmp_path, reserve=0)


@pytest.fixture
def files(tmp_path, rows, ledger):
    return AnswerFiles(tmp_path / "answers", None, rows, ledger)


def read(answers, completed=True):
    return list(answers.answers(completed=completed))


def test_answers_come_back_in_the_order_of_the_input_and_each_once(rows, files, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 500)
    answers = files.of(running(rows, total=120))
    for line in reversed(range(1, 121)):
        assert answers.keep(answer(line, completed=line % 3 > 0, text=f"{line}"))
    assert answers.keep(answer(7, text="again"))
    assert read(answers) == [str(line) for line in range(1, 121) if line % 3]
    assert read(answers, completed=False) == [str(line) for line in range(3, 121, 3)]
    batch = rows.get("acme", "batch_1")
    assert (batch.completed, batch.failed) == (80, 40) and len(rows.parts("batch_1")) == 2
    again = files.of(batch)
    assert again.lines == set(range(1, 121))


def test_what_does_not_count_is_cut_off_and_asked_again(rows, files, tmp_path):
    answers = files.of(running(rows))
    answers.keep(answer(2, text="two"))
    (part,) = rows.parts("batch_1")
    with (files.folder / part.name).open("ab") as file:  # a kill between the file and the database
        file.write(b"3 1 thr")
    again = files.of(rows.get("acme", "batch_1"))
    assert again.lines == {2} and again.keep(answer(3, text="three")) and read(again) == ["two", "three"]


@pytest.mark.parametrize("took", [True, False])
def test_a_database_that_does_not_say_whether_it_took_an_answer_counts_it_once(rows, files, monkeypatch, took):
    answers = files.of(running(rows))
    answers.keep(answer(1, text="one"))
    record = rows.record

    def lost(*arguments):
        if took:
            record(*arguments)
        raise EngineUnavailable("the registry did not answer")

    monkeypatch.setattr(rows, "record", lost)
    with pytest.raises(EngineUnavailable):
        answers.keep(answer(2, text="two"))
    monkeypatch.setattr(rows, "record", record)
    assert answers.keep(answer(3, text="three")) and answers.keep(answer(2, text="two"))
    assert read(answers) == ["one", "two", "three"]
    assert rows.get("acme", "batch_1").completed == 3


def test_a_server_without_the_claim_keeps_nothing(rows, files, registry):
    answers = files.of(running(rows))
    rows.release("batch_1")
    assert BatchRows(registry, LIMITS, me="two", clock=lambda: 1000.0).claim("batch_1", 30)
    assert not answers.keep(answer(1))


KILLED = """
import sys
from tests.serve.jobs.batches.test_answers import *
place, first = sys.argv[1], int(sys.argv[2])
rows = BatchRows(Registry(f"sqlite:///{place}/registry.sqlite"), LIMITS, me="one", clock=lambda: 1000.0)
files = AnswerFiles(Path(place) / "answers", None, rows, ByteLedger(Path(place), reserve=0))
answers = files.of(rows.claim("batch_1", 30))
for line in range(1, 1001):
    if line not in answers.lines and answers.keep(answer(line, text=f"{line} " + "x" * 3000)):
        print(line, flush=True)
"""


def test_no_answer_is_lost_or_comes_twice_when_the_process_is_killed(rows, files, tmp_path):
    running(rows, total=1000)
    said = []
    for _ in range(3):
        script = "from pathlib import Path\n" + KILLED
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "0"], stdout=subprocess.PIPE)
        for _ in range(20):
            said.append(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    answers = files.of(rows.claim("batch_1", 30))
    lines = [int(text.split()[0]) for text in read(answers)]
    assert set(said) <= set(lines) and len(said) == len(set(said)) and len(lines) == len(set(lines))
    assert rows.get("acme", "batch_1").completed == len(lines)


def test_answers_that_an_earlier_loradock_kept_in_rows_are_there(rows, files, registry):
    batch = running(rows)
    with registry.adding() as connection:
        for line, completed in ((2, True), (3, False)):
            row = {"batch": "batch_1", "line": line, "completed": completed, "answer": f"old {line}"}
            connection.execute(insert(batch_answers).values(row))
    answers = files.of(replace(batch, completed=1, failed=1))
    assert answers.lines == {2, 3} and answers.keep(answer(1, text="new"))
    assert read(answers) == ["new", "old 2"] and read(answers, completed=False) == ["old 3"]


def test_another_server_goes_on_where_they_share_what_they_keep(rows, registry, tmp_path, ledger):
    shared = SharedStore(f"file://{tmp_path}/shared")
    here = AnswerFiles(tmp_path / "here", shared, rows, ledger)
    answers = here.of(running(rows))
    answers.keep(answer(1, text="one"))
    answers.keep(answer(2, text="two"))
    rows.release("batch_1")
    theirs = BatchRows(registry, LIMITS, me="two", clock=lambda: 1000.0)
    there = AnswerFiles(tmp_path / "there", shared, theirs, ByteLedger(tmp_path, reserve=0))
    taken = there.of(theirs.claim("batch_1", 30))
    assert taken.lines == {1, 2} and taken.keep(answer(3, text="three")) and read(taken) == ["one", "two", "three"]
    parts = taken.parts()
    there.remove("batch_1", parts)
    assert not any(shared.has_file(name) for name in parts)


def test_lines_whose_file_is_gone_are_asked_again(rows, files):
    answers = files.of(running(rows))
    answers.keep(answer(1))
    (files.folder / answers.parts()[0]).unlink()
    again = files.of(rows.get("acme", "batch_1"))
    assert again.lines == set() and rows.get("acme", "batch_1").completed == 0


def test_the_ledger_counts_answers_again_from_the_disk_when_the_server_starts(rows, files, tmp_path):
    answers = files.of(running(rows))
    answers.keep(answer(1, text="x" * 1000))
    (files.folder / "answers-stray").write_bytes(b"x" * 5000)
    again = ByteLedger(tmp_path, reserve=0)
    started = AnswerFiles(tmp_path / "answers", None, rows, again)
    assert 1000 < again.nbytes("acme", Kind.ANSWERS) < 1100 and not (files.folder / "answers-stray").exists()
    started.remove("batch_1", answers.parts())
    assert again.nbytes("acme") == 0 and list(files.folder.iterdir()) == []


def test_an_answer_without_room_is_not_kept(rows, files, ledger):
    ledger.bound(Bound(frozenset({Kind.ANSWERS}), 2000, "files", "delete some"))
    answers = files.of(running(rows))
    answers.keep(answer(1, text="x" * 1500))
    with pytest.raises(QuotaExceeded):
        answers.keep(answer(2, text="x" * 1500))
    assert answers.keep(answer(3, text="y")) and rows.get("acme", "batch_1").completed == 2


def test_batches_of_others_are_forgotten_by_the_ledger(rows, files, ledger):
    answers = files.of(running(rows))
    answers.keep(answer(1, text="x" * 1000))
    rows.finish("batch_1", made().status, 0, None, None)
    with files.rows._registry.adding() as connection:
        connection.exec_driver_sql("update batches set status = 'completed'")
    files.sweep()
    assert ledger.nbytes("acme") == 0
