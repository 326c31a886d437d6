"""What a start shows a person, what the log file keeps, and what `ps` calls the processes."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.server import AS_ON_A_GPU, Server, descendants, loradock
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine
MOST = 12
of_a_cpu = pytest.mark.skipif(AS_ON_A_GPU, reason="of a CPU alone: nothing is forked, nor bound to a core")


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def titles(server: Server) -> set[str]:
    lines = [title(pid) for pid in descendants(server.process.pid)]
    return {line for line in lines if "resource_tracker" not in line}


@pytest.fixture(params=["info", "debug"])
def started(request):
    """A server that logs at this level."""
    return request.getfixturevalue({"info": "server", "debug": "slowable"}[request.param]), request.param


def test_a_start_is_a_few_lines_of_our_own_and_debug_shows_all(started):
    server, level = started
    assert eventually(lambda: "] ready: http" in server.log.read_text()), "what goes through a pipe may come late"
    shown, kept = server.log.read_text().splitlines(), server.full_log.read_text()
    before_ready = next(number for number, line in enumerate(shown) if "] ready: http" in line)
    assert "EngineCore" in kept and "Initializing a V1 LLM engine" in kept
    if level == "debug":
        # vLLM's processes write through a pipe, whose last lines may come after ours.
        assert eventually(lambda: "Initializing a V1 LLM engine" in server.log.read_text())
        assert eventually(lambda: len(server.log.read_text().splitlines()) > MOST)
        return
    # Both servers are everybody's: what they say later is of requests.
    assert before_ready < MOST, "\n".join(shown)
    shown = shown[: before_ready + 1]
    assert all(re.match(r"(INFO|WARNING) \S+ \S+ \[(serve|loradock)", line) for line in shown), "\n".join(shown)
    told = "\n".join(shown)
    found = re.search(r"loading smollm2 \(\S+\) on (\d+) (CPU core|GPU)s? with vLLM \d", told)
    assert found and (found[2] == "GPU" or int(found[1]) == len(os.sched_getaffinity(0)))
    assert re.search(r"smollm2: KV cache for [\d,]+ tokens", told)
    assert f"listening on {server.url}" in told and str(server.full_log) in told
    assert len(shown) == len(set(shown)), "each thing once"


def test_processes_say_what_they_are(started):
    server, _ = started
    assert "loradock: engine smollm2" in titles(server)
    engines = {"loradock: engine smollm2", "loradock: fork server", "loradock: worker smollm2"}
    assert titles(server) <= engines | {"loradock: grammar compiler", "loradock: front end"}


@of_a_cpu
@pytest.mark.skipif(
    not 2 <= len(os.sched_getaffinity(0)) <= 4, reason="on two to four cores an engine schedules on one"
)
def test_the_server_leaves_its_engine_the_core_on_which_it_schedules(started):
    server, _ = started
    first, *others = sorted(os.sched_getaffinity(0))
    engine = next(pid for pid in descendants(server.process.pid) if "engine smollm2" in title(pid))
    assert os.sched_getaffinity(engine) == {first}
    # A thread that starts a process has every core meanwhile, for the process.
    assert eventually(lambda: cores_of_threads(server.process.pid) == set(others)), cores_of_threads(server.process.pid)


def cores_of_threads(pid: int) -> set[int]:
    cores: set[int] = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            cores |= os.sched_getaffinity(int(thread))
    return cores


@of_a_cpu
@pytest.mark.parametrize("started", ["info"], indirect=True)  # the other one is a program of the tests' own
def test_processes_share_what_the_server_imported(started):
    """A forked process has its program where its parent has it; one that began by itself has it elsewhere."""
    server, _ = started
    family = {server.process.pid, *descendants(server.process.pid)}
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family}
    ours = [pid for pid, words in commands.items() if b"resource_tracker" not in words and b"front end" not in words]
    programs = {Path(f"/proc/{pid}/maps").read_text().partition("-")[0] for pid in ours}
    assert len(ours) >= 3 and len(programs) == 1


def test_an_engine_that_cannot_start_shows_its_error_and_then_the_sentence(tmp_path):
    done = loradock(
        "serve", "--port", "0", "--data-dir", tmp_path, "--max-model-len", "8192", "--kv-cache-memory-bytes", "4M"
    )
    shown = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and shown[-1].startswith("loradock: ")
    assert "Traceback" not in done.stdout + done.stderr and len(shown) <= MOST + 8, done.stderr
    assert "KV cache" in "\n".join(shown[-8:]), done.stderr
    assert "Traceback" in (tmp_path / "log" / "server.log").read_text(), "the whole story is in the file"
