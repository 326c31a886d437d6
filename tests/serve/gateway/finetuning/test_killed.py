"""kill -9 of the server and of the process that trains, at any moment: the job ends once, with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.serve.gateway.finetuning.conftest import examples
from tests.support.server import done, eventually

# `make finetune` kills the real trainer as often.
KILLS = int(os.environ.get("LORADOCK_TEST_JOB_KILLS", "6"))
JOBS = "/v1/fine_tuning/jobs"


def begun(client, name):
    sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", examples())}}
    file = done(client.post("/v1/files", **sent))["id"]
    asked = {"model": "base", "training_file": file, "suffix": name, "seed": 1, "hyperparameters": {"n_epochs": 6}}
    return done(client.post(JOBS, json=asked))["id"]


def ended(client, id):
    assert eventually(lambda: done(client.get(f"{JOBS}/{id}"))["status"] in ("succeeded", "failed"), 60)
    job = done(client.get(f"{JOBS}/{id}"))
    assert job["status"] == "succeeded", job["error"]
    return job


def digests(client, name):
    return [version["digest"] for version in done(client.get(f"/v1/adapters/{name}"))["versions"]]


def trainer(data):
    """The process that trains over a folder of this data directory."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"{data}/finetuning".encode() in (entry / "cmdline").read_bytes():
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
        assert eventually(lambda: trainer(data) is None, 10), "the process outlived its server"
        server = zygote.start()
    job = ended(client, id)
    assert job["fine_tuned_model"] == "killed@v3" and digests(client, "killed") == digests(client, "calm")
    said = [event["message"] for event in done(client.get(f"{JOBS}/{id}/events", params={"limit": 100}))["data"]]
    assert said.count("The job has successfully completed") == said.count("Fine-tuning job started") == 1
    steps = [message for message in said if message.startswith("Step ")]
    assert len(steps) == len(set(steps)) == 12
    assert eventually(lambda: not list((data / "finetuning").iterdir()), 10)
    zygote.kill(server)
