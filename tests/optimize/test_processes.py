"""Whatever a run has started ends with it, however the run ends; counted by a variable that descendants inherit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimize.processes import ProcessGroup
from tests.campaigns.kills import ROOT, command
from tests.support.waiting import eventually

MARK = "LORADOCK_TEST_RUN"
# Seconds until a step runs, or until all processes of a run are gone.
PATIENCE = 120
# A step that starts a process which hears no signal, in a process of its own, and never ends.
LONG_STEP = """
import subprocess, sys, time, types

def run(job, progress):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    subprocess.Popen([sys.executable, "-S", "-c", stubborn])
    progress(1, 2, "the step runs")
    time.sleep(1000)

module = types.ModuleType("optimize.steps.quantize.quantize")
module.run = run
sys.modules[module.__name__] = module
"""


@pytest.fixture
def mark() -> Iterator[str]:
    value = uuid.uuid4().hex
    yield value
    for pid in running(value):
        os.kill(pid, signal.SIGKILL)


def running(mark: str, word: str = "") -> list[int]:
    """The processes alive that inherited the mark and have the word in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if marked and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass  # gone meanwhile, or not ours
    return found


def started(pid: int) -> int:
    """When a process began, in the kernel's ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def optimizing(mark: str, recipe: Path, out: Path, path: Path | None = None) -> subprocess.Popen[bytes]:
    environ = {**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(path or "")]))}
    # Whoever runs these tests in the background or with nohup has signals ignored, which children inherit.
    return subprocess.Popen(
        command(recipe, "--out", out),
        env=environ,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process(how, mark, written, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LONG_STEP)
    run = optimizing(mark, written("steps: [quantize]"), tmp_path / "out", tmp_path)
    assert eventually(lambda: running(mark, "SIG_IGN"), PATIENCE)
    run.send_signal(how)
    run.wait()
    assert eventually(lambda: not running(mark), PATIENCE)


def test_a_step_that_is_killed_takes_along_what_it_started(mark, written, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LONG_STEP)
    run = optimizing(mark, written("steps: [quantize]"), tmp_path / "out", tmp_path)
    assert eventually(lambda: running(mark, "SIG_IGN"), PATIENCE)
    resident, step = sorted(running(mark, "optimize.pipeline.resident"), key=started)
    assert f"PPid:\t{resident}\n" in Path(f"/proc/{step}/status").read_text()
    os.kill(step, signal.SIGKILL)
    assert run.wait() == 1
    assert eventually(lambda: not running(mark), PATIENCE)


@pytest.mark.engine
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_engine(how, mark, written, tmp_path):
    recipe = written("")
    recipe.write_text(recipe.read_text().replace("engine: false", "engine: true"))
    run = optimizing(mark, recipe, tmp_path / "out")
    assert eventually(lambda: running(mark, "optimize.evaluation.engine"), PATIENCE)
    run.send_signal(how)
    run.wait()
    assert eventually(lambda: not running(mark), PATIENCE)


def test_a_group_ends_with_its_block():
    with ProcessGroup() as group:
        process = group.start(["sleep", "1000"])
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_ends_by_itself_keeps_its_exit_code():
    with ProcessGroup() as group:
        process = group.start([sys.executable, "-S", "-c", "raise SystemExit(3)"])
        assert process.wait() == 3
    assert process.returncode == 3
