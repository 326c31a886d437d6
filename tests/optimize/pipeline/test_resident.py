"""Steps are forks of one process, which imports for all of them; one that is killed takes nothing from the next."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from optimize.pipeline.resident import Forked, Resident
from optimize.processes import ProcessGroup


@pytest.fixture
def resident() -> Iterator[Resident]:
    started = Resident()
    yield started
    started.close()


def begun(resident: Resident, folder: Path, group: ProcessGroup) -> tuple[Forked, int]:
    """The process of a step, which waits for what comes by its file, and where it reports."""
    file = folder / "job.json"
    if not file.exists():
        os.mkfifo(file)
    read, write = os.pipe()
    with (folder / "log").open("w") as log:
        process = resident.start(file, write, log.fileno(), group.number, os.environ)
    os.close(write)
    return process, read


def parent(pid: int) -> str:
    return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid"))


def test_steps_are_forks_of_one_process_and_one_that_is_killed_leaves_it_alive(resident, job, tmp_path):
    with ProcessGroup() as group:
        process, read = begun(resident, tmp_path, group)
        first = parent(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        os.close(read)
    with ProcessGroup() as group:
        process, read = begun(resident, tmp_path, group)
        assert parent(process.pid) == first
        (tmp_path / "job.json").write_bytes(msgspec.json.encode(job("quantize", model=tmp_path / "missing")))
        with os.fdopen(read) as pipe:
            said = [json.loads(line) for line in pipe]
        assert "missing" in said[-1]["error"] and process.wait() == 1


def test_a_step_ends_with_its_group(resident, tmp_path):
    with ProcessGroup() as group:
        process, read = begun(resident, tmp_path, group)
        assert os.getpgid(process.pid) == group.number
    assert process.wait() == -signal.SIGKILL
    os.close(read)


def test_a_resident_that_was_killed_is_started_again(resident, tmp_path):
    found = []
    for _ in range(2):
        with ProcessGroup() as group:
            process, read = begun(resident, tmp_path, group)
            found.append(int(parent(process.pid).split()[1]))
            os.kill(found[-1], signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            os.close(read)
    assert found[0] != found[1]
