"""The program that really trains, over HTTP: a small model of random weights, and the backend without an engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from serve.config import keys_hashed, load
from serve.jobs.finetuning import process_tree
from serve.jobs.finetuning.training_process import COMMAND
from tests.optimize.steps.test_tune import TEMPLATE, answering, preferring
from tests.serve.jobs.finetuning.conftest import begun, ended, messages, parts_of, sent, stepped
from tests.support import pico
from tests.support.backend import FakeBackend
from tests.support.served import Served
from tests.support.server import ROOT, done
from tests.support.waiting import eventually, settled

pytestmark = pytest.mark.timeout(1200)
# The command, whose trainer is not behind everything else: on a machine that does other work it would never train.
AT_ONCE = """
from serve.cli.entry import main
from serve.jobs.finetuning.training_process import TrainingProcess

TrainingProcess.__init__.__kwdefaults__["nice"] = 0
main()
"""


@pytest.fixture
def base(tmp_path):
    """A small Llama with a chat template."""
    folder = tmp_path / "chat"
    words = pico.tokenizer()
    pico.model(words).bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def config(base, tmp_path):
    return load([str(base), "--name", "base", "--no-drift", "--data-dir", str(tmp_path / "data")], {})


@pytest.fixture
def small(base, config, connect):
    """`async with small as client`: a server of that model."""
    server = connect(config, FakeBackend(str(base)))
    process = server.app.state.parts.fine_tuning.runner.process
    assert process.command == COMMAND
    process.nice = 0
    return server


def rows(examples):
    return "".join(json.dumps(example) + "\n" for example in examples).encode()


async def restarts(ai, id):
    return [message for message in await messages(ai, id) if "started again" in message]


def method(type="supervised", **hyperparameters):
    return {"type": type, type: {"hyperparameters": {"rank": 4, "learning_rate": 1e-2, **hyperparameters}}}


async def test_examples_and_preferences_and_what_was_learned_before(small, sdk):
    async with small as client:
        ai = sdk(client)
        held_out = await sent(ai, rows(answering(range(40, 44))))
        asked = {"method": method(n_epochs=2, batch_size=4), "validation_file": held_out}
        job = await ended(ai, await begun(ai, rows(answering(range(24))), **asked))
        assert (job.status, job.error) == ("succeeded", None), job.error
        hyperparameters = job.hyperparameters
        assert (hyperparameters.n_epochs, hyperparameters.batch_size, hyperparameters.rank) == (2, 4, 4)
        losses = [line.split(",")[1] for line in (await ai.files.content(job.result_files[0])).text.splitlines()[1:]]
        assert len(losses) == 12 and float(losses[-1]) < float(losses[0])
        checkpoints = (await ai.fine_tuning.jobs.checkpoints.list(job.id)).data
        assert [row.step_number for row in checkpoints] == [12, 6] and checkpoints[0].metrics.full_valid_loss
        assert job.trained_tokens > 0 and await ai.chat.completions.create(model=job.fine_tuned_model, messages=[])

        undisturbed = (await client.get("/v1/adapters/tone")).json()["versions"][-1]["digest"]
        id = await begun(ai, rows(answering(range(24))), **asked, suffix="killed")
        # First what trains, then also who started it.
        for process in process_tree.children(await stepped(client, id, 2)):
            os.kill(process, signal.SIGKILL)
        async with asyncio.timeout(300):
            while not await restarts(ai, id):
                await asyncio.sleep(0.05)
        os.kill(await stepped(client, id, 3), signal.SIGKILL)
        again = await ended(ai, id)
        assert (again.status, again.error) == ("succeeded", None)
        by_one, by_other = await restarts(ai, id)
        assert "signal 9" in by_one + by_other, (by_one, by_other)
        assert (await client.get("/v1/adapters/killed")).json()["versions"][-1]["digest"] == undisturbed

        pairs = {"n_epochs": 1, "batch_size": 4, "beta": 0.2, "learning_rate": 1e-2}
        asked = {"model": job.fine_tuned_model, "method": {"type": "dpo", "dpo": {"hyperparameters": pairs}}}
        further = await ended(ai, await begun(ai, rows(preferring(range(12))), **asked))
        assert (further.status, further.error) == ("succeeded", None)
        version = (await client.get("/v1/adapters/tone")).json()["versions"][-1]
        assert version["checks"]["parent"] == job.fine_tuned_model and not version["live"]
        left = parts_of(client).fine_tuning.runner.folders.folder(further.id).path
        assert await settled(lambda: not left.exists())


def test_the_command_of_a_worker_trains_a_job_and_ends(base, config, tmp_path):
    config = replace(config, admin_keys=keys_hashed(["run"]), finetune_on="workers")
    with Served(config, FakeBackend(str(base)), "run") as served:
        served.app.state.parts.fine_tuning.runner.process.nice = 0
        http = served.http
        sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", rows(answering(range(24))))}}
        file = done(http.post("/v1/files", **sent))["id"]
        asked = {"model": "base", "training_file": file, "suffix": "tone", "method": method(n_epochs=2, batch_size=4)}
        job = f"/v1/fine_tuning/jobs/{done(http.post('/v1/fine_tuning/jobs', json=asked))['id']}"
        assert eventually(lambda: done(http.get(job))["status"] == "queued", 300)
        created = http.post("/v1/keys", json={"tenant": "default", "name": "box", "scopes": ["finetune:work"]})
        command = [sys.executable, "-c", AT_ONCE, "finetune", "worker", "--once", "--server", served.url]
        command += ["--base", str(base), "--folder", str(tmp_path / "box")]
        environ = {**os.environ, "LORADOCK_KEY": created.json()["secret"]}
        ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
        assert ran.returncode == 0, ran.stderr
        assert eventually(lambda: done(http.get(job))["status"] in ("succeeded", "failed"), 300)
        ended = done(http.get(job))
        assert (ended["status"], ended["error"], ended["fine_tuned_model"]) == ("succeeded", None, "tone@v1"), ended
        (version, *_) = done(http.get("/v1/adapters/tone"))["versions"]
        assert version["live"] and version["provenance"]["origin"].startswith("fine-tuning job")
