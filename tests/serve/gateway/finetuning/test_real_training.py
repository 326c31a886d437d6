"""The program that really trains, over HTTP: a small model of random weights, and the backend without an engine."""

from __future__ import annotations

import json
import os
import signal

import pytest

from serve.config import load
from serve.gateway.finetuning.training_process import COMMAND
from tests.optimize.steps.test_tune import TEMPLATE, answering, preferring
from tests.serve.gateway.finetuning.conftest import begun, ended, messages, parts_of, sent, stepped
from tests.support import pico
from tests.support.app import settled
from tests.support.backend import FakeBackend

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def small(tmp_path, connect):
    """`async with small as client`: a server of a small Llama with a chat template."""
    folder = tmp_path / "chat"
    words = pico.tokenizer()
    pico.model(words).bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = load([str(folder), "--name", "base", "--no-drift", "--data-dir", str(tmp_path / "data")], {})
    server = connect(config, FakeBackend(str(folder)))
    process = server.app.state.parts.fine_tuning.process
    assert process.command == COMMAND
    process.nice = 0
    return server


def rows(examples):
    return "".join(json.dumps(example) + "\n" for example in examples).encode()


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
        os.kill(await stepped(client, id, 2), signal.SIGKILL)
        again = await ended(ai, id)
        assert (again.status, again.error) == ("succeeded", None)
        assert any("signal 9" in message for message in await messages(ai, id))
        assert (await client.get("/v1/adapters/killed")).json()["versions"][-1]["digest"] == undisturbed

        pairs = {"n_epochs": 1, "batch_size": 4, "beta": 0.2, "learning_rate": 1e-2}
        asked = {"model": job.fine_tuned_model, "method": {"type": "dpo", "dpo": {"hyperparameters": pairs}}}
        further = await ended(ai, await begun(ai, rows(preferring(range(12))), **asked))
        assert (further.status, further.error) == ("succeeded", None)
        version = (await client.get("/v1/adapters/tone")).json()["versions"][-1]
        assert version["checks"]["parent"] == job.fine_tuned_model and not version["live"]
        left = parts_of(client).fine_tuning.runner.folder(further.id).path
        assert await settled(lambda: not left.exists(), 15)
