"""The program that trains: where it stands among all others, and how it is suspended, stopped and ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from serve.jobs.finetuning import process_tree
from serve.jobs.finetuning.training_process import CannotCheck, Ended, TrainingProcess, Why
from serve.models.embedded import ensure
from tests.support.waiting import eventually

# Starts another program, and goes on.
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "


def started(process, folder, stop, **more):
    """The thread in which it runs, and where its end will be."""
    ends = []
    thread = threading.Thread(target=lambda: ends.append(process.run(folder, stop, lambda ran: True, **more)))
    thread.start()
    return thread, ends


def command_of(process):
    return Path(f"/proc/{process}/cmdline").read_bytes()


def state_of(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_runs_behind_everything_else_and_is_the_first_to_go(tmp_path):
    stop, process = threading.Event(), TrainingProcess(command=("/bin/sh", "-c", "sleep 60"))
    thread, ends = started(process, tmp_path, stop)
    assert eventually(
        lambda: process.pid and Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith((b"/bin/sh", b"sleep"))
    )
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"
    assert os.getsid(process.pid) == os.getsid(0) and os.getpgid(process.pid) == process.pid
    stop.set()
    thread.join(30)
    assert ends == [Ended(Why.STOPPED, -signal.SIGTERM)]


def test_what_it_started_is_suspended_and_ended_with_it(tmp_path):
    busy, stop = [False], threading.Event()
    process = TrainingProcess(lambda: busy[0], command=(sys.executable, "-c", PARENT + "time.sleep(60)"), nice=0)
    thread, ends = started(process, tmp_path, stop, seconds=30.0)
    assert eventually(lambda: process.pid and process_tree.children(process.pid))
    (child,) = process_tree.children(process.pid)
    # Until it is another program, who started it waits for that and would not be suspended.
    assert eventually(lambda: command_of(child) != command_of(process.pid))
    busy[0] = True
    assert eventually(lambda: state_of(child) == state_of(process.pid) == "T" and process.suspended)
    busy[0] = False
    assert eventually(lambda: state_of(child) != "T" and not process.suspended)
    process.stall = -1.0
    thread.join(30)
    assert not thread.is_alive() and ends[0].why is Why.HUNG
    assert eventually(lambda: not Path(f"/proc/{child}").exists() or state_of(child) == "Z")


def test_it_gets_no_keys_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("LORADOCK_ADMIN_KEYS", "secret")
    process = TrainingProcess(command=("/bin/sh", "-c", "env"), nice=0)
    assert process.run(tmp_path, threading.Event(), lambda ran: True) == Ended(Why.ENDED, 0)
    said = (tmp_path / "log").read_text()
    assert "PYTHONPATH=" in said and "LORADOCK" not in said


def test_a_program_that_cannot_check_says_why(tmp_path):
    process = TrainingProcess(command=("/bin/sh", "-c", "echo no torch >&2; exit 3"), nice=0)
    with pytest.raises(CannotCheck, match="exit code 3.*no torch"):
        process.check(tmp_path / "x", "supervised", 10, tmp_path, threading.Event())


def test_a_check_ends_when_it_is_told_to_and_its_time_stands_still_under_load(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.jobs.finetuning.training_process.CHECK_SECONDS", 0.0)
    asked = []

    def is_busy():
        asked.append(1)
        return len(asked) < 3

    hangs, stop = ("/bin/sh", "-c", "exec sleep 60"), threading.Event()
    with pytest.raises(CannotCheck, match="took longer than 0 s"):
        TrainingProcess(is_busy, command=hangs, nice=0).check(tmp_path / "x", "supervised", 10, tmp_path, stop)
    assert len(asked) == 3
    process = TrainingProcess(lambda: bool(stop.set()) or True, command=hangs, nice=0)
    assert process.check(tmp_path / "x", "supervised", 10, tmp_path, stop) is None


def test_an_example_of_which_nothing_is_learned_is_told_with_its_line_before_any_training(tmp_path):
    embedded = ensure("smollm2")
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}
    long = {"messages": [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "yes"}]}
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [good, long, good]))
    process = TrainingProcess(nice=0)
    checked = process.check(file, "supervised", 1, embedded, threading.Event())
    (problem,) = checked.problems
    assert problem.line == 2 and "9,0" in problem.message and "shorten what stands before the answer" in problem.message
    assert "max_length" not in problem.message, "the API does not take it"
    file.write_text(json.dumps(good) + "\n")
    assert not process.check(file, "supervised", 1, embedded, threading.Event()).problem_count
