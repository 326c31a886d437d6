"""Processes forked from the one that has imported vLLM: their environment, their parent, their end."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

from serve import forkserver
from serve.forkserver import Context
from serve.plugin import _follow


def report(path: Path) -> None:
    parent = multiprocessing.parent_process()
    path.write_text(json.dumps([os.environ.get("GIVEN_LATE"), os.environ.get("TAKEN_LATE"), parent.pid]))


def test_a_process_has_the_environment_of_its_creators_last_word(tmp_path, monkeypatch):
    monkeypatch.setenv("TAKEN_LATE", "there when the server of forks starts")
    multiprocessing.forkserver.ensure_running()
    process = Context().Process(target=report, args=(tmp_path / "out",))
    monkeypatch.setenv("GIVEN_LATE", "yes")
    monkeypatch.delenv("TAKEN_LATE")
    process.start()
    process.join(30)
    assert process.exitcode == 0
    # Its parent is its creator, though it was forked elsewhere: with that one's end it must end.
    assert json.loads((tmp_path / "out").read_text()) == ["yes", None, os.getpid()]


def test_without_an_openmp_to_preload_vllm_starts_its_processes_itself(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    monkeypatch.delenv(forkserver.VARIABLE, raising=False)
    forkserver.start()
    assert forkserver.VARIABLE not in os.environ


def test_after_one_has_ended_the_next_comes_from_a_fresh_one(tmp_path, monkeypatch):
    multiprocessing.forkserver.ensure_running()
    server = multiprocessing.forkserver._forkserver
    old = server._forkserver_pid
    monkeypatch.setenv(forkserver.VARIABLE, "1")
    forkserver.renew()
    assert server._forkserver_pid == old
    forkserver.ended()
    forkserver.renew()
    assert server._forkserver_pid not in (None, old)
    process = Context().Process(target=report, args=(tmp_path / "out",))
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_a_process_follows_its_parent_and_not_what_its_parent_writes():
    ours, parents = os.pipe()
    left: list[int] = []
    following = threading.Thread(target=_follow, args=(ours, left.append))
    following.start()
    os.write(parents, b"what to do")
    following.join(0.2)
    assert following.is_alive() and not left
    os.close(parents)
    following.join(5)
    assert left == [1]
    os.close(ours)
