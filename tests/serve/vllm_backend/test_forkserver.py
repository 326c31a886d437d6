"""Processes forked from the one that has imported vLLM: their environment, their parent, their end."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

from serve.vllm_backend import forkserver
from serve.vllm_backend.forkserver import Context
from serve.vllm_backend.plugin import _follow
from tests.support.server import eventually


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


def test_the_next_comes_from_a_fresh_one_and_the_old_one_ends_with_its_last(tmp_path):
    waits, ends = multiprocessing.Pipe()
    last = Context().Process(target=waits.recv)
    last.start()
    server = multiprocessing.forkserver._forkserver
    old = server._forkserver_pid
    forkserver.leave()
    process = Context().Process(target=report, args=(tmp_path / "out",))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert server._forkserver_pid not in (None, old)
    assert last.is_alive() and Path(f"/proc/{old}").exists()
    ends.send("end")
    last.join(30)
    assert last.exitcode == forkserver.UNKNOWN, "its end is heard of, its status went with the old one"
    assert eventually(lambda: not Path(f"/proc/{old}").exists(), 10), "neither running nor a zombie"


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
