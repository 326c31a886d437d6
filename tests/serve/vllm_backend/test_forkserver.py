"""Processes forked from the one that has imported vLLM: their environment, their parent, their end."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from serve.vllm_backend import forkserver
from serve.vllm_backend.forkserver import Context, follow
from tests.support.waiting import eventually


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
    assert eventually(lambda: not Path(f"/proc/{old}").exists()), "neither running nor a zombie"


def test_a_fork_server_that_does_not_answer_is_left_for_a_fresh_one(tmp_path, monkeypatch):
    multiprocessing.forkserver.ensure_running()
    server = multiprocessing.forkserver._forkserver
    stuck = server._forkserver_pid
    os.kill(stuck, signal.SIGSTOP)
    monkeypatch.setattr(forkserver, "ANSWER_SECONDS", 0.2)
    try:
        process = Context().Process(target=report, args=(tmp_path / "out",))
        process.start()
        process.join(30)
        assert process.exitcode == 0 and (tmp_path / "out").exists()
        assert server._forkserver_pid not in (None, stuck)
    finally:
        os.kill(stuck, signal.SIGCONT)
    # What it was asked for in vain is nobody's, and it has nothing else to do.
    assert eventually(lambda: not Path(f"/proc/{stuck}").exists())


def test_a_fresh_one_outlives_the_thread_that_asked_for_it(tmp_path):
    multiprocessing.forkserver.ensure_running()
    asking = threading.Thread(target=forkserver.leave)
    asking.start()
    asking.join(30)
    fresh = multiprocessing.forkserver._forkserver._forkserver_pid
    process = Context().Process(target=report, args=(tmp_path / "out",))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and multiprocessing.forkserver._forkserver._forkserver_pid == fresh


FORKED = """
import gc, json, logging, multiprocessing, os, socket, sys
from pathlib import Path
from serve.vllm_backend import forkserver

logging.getLogger("serve").addHandler(logging.StreamHandler())
held = socket.create_server(("127.0.0.1", 0))
os.environ["LD_PRELOAD"] = "/x/libomp.so"
forkserver._preloaded = lambda libraries: True
forkserver.PRELOAD = forkserver.PREPARED = "tests.serve.vllm_backend.pretended"
gc.disable()
forkserver.start(imported=lambda: sys.modules.update(beside=sys))
sys.modules["tests.serve.vllm_backend.pretended"].later = True
from tests.serve.vllm_backend.test_forkserver import look  # it has threads by now
process = forkserver.Context().Process(target=look, args=(sys.argv[1], held.fileno()))
process.start()
process.join(30)
print(process.exitcode, os.getpid(), multiprocessing.forkserver._forkserver._forkserver_pid, flush=True)
"""


def look(out: str, descriptor: int) -> None:
    """What a process has of the server that it was forked from."""
    imported = sys.modules.get("tests.serve.vllm_backend.pretended")
    try:
        os.fstat(descriptor)
        held = os.path.exists(f"/proc/self/fd/{descriptor}") and "socket" in os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        held = False
    found = {
        "imported": imported is not None and not hasattr(imported, "later"),
        "beside": "beside" in sys.modules,
        "held": held,
        "collects": gc.isenabled(),
        "handlers": len(logging.getLogger("serve").handlers),
        "server": os.getppid(),
        "title": Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0 "),
    }
    Path(out).write_text(json.dumps(found))


def test_processes_are_forked_from_what_the_server_has_imported(tmp_path):
    root = Path(__file__).parents[3]
    out = tmp_path / "out"
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(out)], env=environ, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    code, server, forks = done.stdout.split()
    found = json.loads(out.read_text())
    assert code == "0" and found["imported"], "imported by the server, once"
    assert found["beside"], "and what it needs for itself, before its memory is shared"
    assert not found["held"] and not found["handlers"], "nothing of the server's own"
    assert found["collects"]
    assert found["server"] == int(forks) != int(server) and found["title"] == "loradock: fork server"
    assert eventually(lambda: not running(int(forks))), "it ends with the server"


BESIDE = """
import _thread, os, time
from serve.vllm_backend import forkserver

_thread.start_new_thread(time.sleep, (60,))  # `threading` knows nothing of it
os.environ["LD_PRELOAD"] = "/x/libomp.so"
forkserver._preloaded = lambda libraries: True
forkserver.PRELOAD = forkserver.PREPARED = "tests.serve.vllm_backend.pretended"
forkserver._fork = lambda: print("forked")
forkserver.forkserver.ensure_running = lambda: print("imports for itself")
forkserver.start()
"""


def test_a_process_with_threads_is_not_forked():
    root = Path(__file__).parents[3]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", BESIDE], env=environ, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "imports for itself\n", done.stderr


def test_a_process_follows_its_parent_and_not_what_its_parent_writes():
    ours, parents = os.pipe()
    left: list[int] = []
    following = threading.Thread(target=follow, args=(ours, left.append))
    following.start()
    os.write(parents, b"what to do")
    following.join(0.2)
    assert following.is_alive() and not left
    os.close(parents)
    following.join(60)
    assert left == [1]
    os.close(ours)


SERVER = """
import multiprocessing, os, sys, time
from serve.vllm_backend import forkserver
from tests.serve.vllm_backend.test_forkserver import stuck

multiprocessing.set_forkserver_preload(["tests.serve.vllm_backend.dying"])
multiprocessing.forkserver.ensure_running()
engines = [forkserver.Context().Process(target=stuck, args=(sys.argv[1],)) for _ in range(2)]
for engine in engines:
    engine.start()
print(multiprocessing.forkserver._forkserver._forkserver_pid, *(engine.pid for engine in engines), flush=True)
time.sleep(600)
"""


def stuck(folder: str) -> None:
    """Holds Python's lock, as a library may for minutes: no thread of this process can look whether anybody is left."""
    Path(folder, str(os.getpid())).touch()
    ctypes.PyDLL(None).sleep(600)


def test_a_stuck_engine_ends_with_its_server_too(tmp_path):
    root = Path(__file__).parents[3]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, env=environ, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        try:
            pids = [int(pid) for pid in server.stdout.readline().split()]
            assert len(pids) == 3
            assert eventually(lambda: len(list(tmp_path.iterdir())) == 2)
            assert all(running(pid) for pid in pids)
        finally:
            server.kill()
    try:
        assert eventually(lambda: not any(running(pid) for pid in pids)), "a process outlived its server"
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    """Neither gone nor a zombie whom nobody collects."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
