"""`loradock finetune` against a server whose trainer is the stand-in."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from serve.cli.finetune import finetune_app
from tests.serve.jobs.finetuning.conftest import examples
from tests.support.zygote import Zygote


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    zygote = Zygote(tmp_path_factory.mktemp("server") / "data", tiny_model, STAND_IN='{"hang": 10}')
    process = zygote.start()
    yield zygote
    zygote.kill(process)
    zygote.close()


@pytest.fixture(scope="module")
def run(server):
    """`run("list", "--json")`: the result of the command."""
    return lambda *words: CliRunner().invoke(finetune_app, [*map(str, words), "--url", str(server.client.base_url)])


def test_a_job_from_its_file_to_its_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.client.fine_tuning_client.LOOK_SECONDS", 0.1)
    file, held_out = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    file.write_bytes(examples())
    held_out.write_bytes(examples(3, "no"))
    asked = ("create", file, "--model", "base", "--name", "tone", "--validation", held_out, "--epochs", 2, "--seed", 1)
    made = run(*asked, "--wait")
    assert made.exit_code == 0, made.output
    assert "Fine-tuning job started" in made.output and "succeeded: tone@v1" in made.output
    (job,) = json.loads(run("list", "--json").stdout)["data"]
    assert job["hyperparameters"]["n_epochs"] == 2 and job["seed"] == 1
    assert "tone@v1" in run("list").stdout and "succeeded" in run("list").stdout
    page = run("show", job["id"]).stdout
    assert "tone@v2" in page and "VALID LOSS" in page
    assert "The job has successfully completed" in run("events", job["id"]).stdout
    refused = run("cancel", job["id"])
    assert refused.exit_code == 1 and "Cannot cancel a job with status 'succeeded'" in refused.stderr


def test_a_job_is_paused_and_goes_on_and_ends(run, tmp_path):
    """The trainer never comes to its end, however long this takes."""
    file = tmp_path / "train.jsonl"
    file.write_bytes(examples())
    job = json.loads(run("create", file, "--model", "base", "--epochs", 10, "--json").stdout)
    for verb, status in (("pause", "paused"), ("resume", "(validating_files|queued)"), ("cancel", "cancelled")):
        assert re.fullmatch(f"{job['id']} is {status}\n", run(verb, job["id"]).stdout)


def test_what_is_wrong_is_a_sentence(run, server, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(examples())
    kept = server.client.get("/v1/files").json()
    for words in ((tmp_path / "nowhere",), (file, "--validation", tmp_path / "nowhere")):
        missing = run("create", *words, "--model", "base")
        assert missing.exit_code == 2 and "does not exist" in missing.stderr
    assert server.client.get("/v1/files").json() == kept, "nothing is sent before everything is there"
    refused = run("create", file, "--validation", file, "--model", "nowhere")
    assert refused.exit_code == 1 and "`nowhere` does not exist" in refused.stderr
    assert server.client.get("/v1/files").json() == kept, "what no job takes is not left there"
    unknown = run("show", "ftjob-0", "--json")
    assert unknown.exit_code == 1 and json.loads(unknown.stderr)["error"]["code"] == "fine_tune_not_found"
