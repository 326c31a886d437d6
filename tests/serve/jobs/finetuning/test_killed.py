"""kill -9 of server, worker and the process that trains, at any moment: the job ends once, with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.serve.jobs.finetuning.conftest import examples
from tests.support.server import ROOT, done
from tests.support.waiting import eventually
from tests.support.zygote import Zygote

# `make finetune` kills the real trainer as often.
KILLS = int(os.environ.get("LORADOCK_TEST_JOB_KILLS", "6"))
JOBS = "/v1/fine_tuning/jobs"


def begun(client, name):
    sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", examples())}}
    file = done(client.post("/v1/files", **sent))["id"]
    asked = {"model": "base", "training_file": file, "suffix": name, "seed": 1, "hyperparameters": {"n_epochs": 6}}
    return done(client.post(JOBS, json=asked))["id"]


def ended(client, id):
    # A worker that is killed before it knows what it was given leaves its claim to end by itself, after 60 s.
    assert eventually(lambda: done(client.get(f"{JOBS}/{id}"))["status"] in ("succeeded", "failed"), 150)
    job = done(client.get(f"{JOBS}/{id}"))
    assert job["status"] == "succeeded", job["error"]
    return job


def digests(client, name):
    return [version["digest"] for version in done(client.get(f"/v1/adapters/{name}"))["versions"]]


def trainer(data, below="finetuning"):
    """The process that trains over a folder of this data directory."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"{data}/{below}".encode() in (entry / "cmdline").read_bytes():
                return int(entry.name)
    return None


@pytest.mark.timeout(120 + 10 * KILLS)
def test_a_job_ends_once_over_kills_at_any_moment(zygote, tmp_path):
    draw, data = random.Random(3), tmp_path / "data"
    server, client = zygote.start(), zygote.client
    ended(client, begun(client, "calm"))
    id = begun(client, "killed")
    for _ in range(KILLS):
        time.sleep(draw.uniform(0.05, 0.9))
        process = trainer(data)
        if process is not None and draw.random() < 0.5:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            continue
        zygote.kill(server)
        assert eventually(lambda: trainer(data) is None), "the process outlived its server"
        server = zygote.start()
    ended_once(client, id)
    assert eventually(lambda: not list((data / "finetuning").iterdir()))
    zygote.kill(server)


def ended_once(client, id):
    """With the bytes of the job that was left in peace."""
    job = ended(client, id)
    assert job["fine_tuned_model"] == "killed@v1" and digests(client, "killed") == digests(client, "calm")
    said = [event["message"] for event in done(client.get(f"{JOBS}/{id}/events", params={"limit": 100}))["data"]]
    assert said.count("The job has successfully completed") == said.count("Fine-tuning job started") == 1
    steps = [message for message in said if message.startswith("Step ")]
    assert len(steps) == len(set(steps)) == 12


@pytest.fixture
def remote(tmp_path, tiny_model):
    """Servers that leave their jobs to workers."""
    zygote = Zygote(tmp_path / "data", tiny_model, "--finetune-on", "workers")
    yield zygote
    zygote.close()


@pytest.fixture
def box(remote, tmp_path, tiny_model):
    """`box()`: a process that is a worker of the server, always in the same folder."""
    begun = []
    program = [sys.executable, "-m", "tests.support.training_worker", str(remote.client.base_url).rstrip("/")]
    environ = {**os.environ, "STAND_IN": '{"seconds": 0.15}'}

    def start():
        command = [*program, str(tmp_path / "box"), str(tiny_model)]
        begun.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout.readline() == "ready\n"
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.timeout(120 + 20 * KILLS)
def test_a_job_at_a_worker_ends_once_over_kills_of_worker_and_server(remote, box, tmp_path):
    draw = random.Random(5)
    server, client, worker = remote.start(), remote.client, box()
    ended(client, begun(client, "calm"))
    id = begun(client, "killed")
    for _ in range(max(2, KILLS // 2)):
        time.sleep(draw.uniform(0.1, 1.2))
        if draw.random() < 0.5:
            remote.kill(server)
            server = remote.start()
            continue
        worker.kill()
        worker.wait()
        assert eventually(lambda: trainer(tmp_path / "box", "jobs") is None), "the process outlived its worker"
        worker = box()
    ended_once(client, id)
    assert eventually(lambda: not list((tmp_path / "box" / "jobs").iterdir()))
    remote.kill(server)
