"""A killed engine's memory is free before the next one starts: the workers that it leaves behind are waited for."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

from serve.vllm_backend import building
from serve.vllm_backend.engine_processes import Member, end, members, private_bytes

# An engine that started a worker which hears of no end.
ENGINE = """
import signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_workers_that_outlive_a_killed_engine_are_ended_and_waited_for():
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE)
    worker = int(engine.stdout.readline())
    family = members(building.family([SimpleNamespace(pid=engine.pid, exitcode=None)]))
    assert {member.pid for member in family} == {engine.pid, worker}
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    assert [member.pid for member in family if member.alive] == [worker], "nobody else knows of it any more"
    end(family)
    assert not any(member.alive for member in family)
    engine.stdout.close()


def test_a_process_that_took_the_number_of_one_that_ended_is_left_alone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (member,) = members([process.pid])
        end([Member(member.pid, str(int(member.born) - 1))])
        assert process.poll() is None and member.alive
    finally:
        process.kill()
        process.wait()
    assert not member.alive


def test_what_cannot_be_ended_is_said_and_not_waited_for_for_ever(caplog, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: None)
    end(members([os.getpid()]), seconds=0.05)
    assert f"processes [{os.getpid()}] of an engine were killed and are still there" in caplog.text


def test_a_process_s_own_memory_is_what_it_has_written_and_shares_with_nobody():
    size = 64 << 20
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = private_bytes(os.getpid())
    own[: size : mmap.PAGESIZE] = bytes([1]) * (size // mmap.PAGESIZE)
    written = private_bytes(os.getpid()) - before
    assert size // 2 < written < 2 * size
    child = os.fork()
    if not child:
        signal.pause()
    try:
        assert private_bytes(os.getpid()) - before < size // 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert private_bytes(1 << 30) == 0
