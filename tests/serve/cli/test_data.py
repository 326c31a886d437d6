"""`loradock data` against a server of which one adapter learns."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from serve.cli.adapters import adapters_app
from serve.cli.data import _progress, data_app
from tests.support import tiny
from tests.support.app import CHAT, upload
from tests.support.waiting import eventually
from tests.support.zygote import Zygote


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    """With the adapters `tone`, which learns, and `other`, which does not."""
    folder = tmp_path_factory.mktemp("server")
    policies = json.dumps({"tone": {"train_on_traffic": True}})
    zygote = Zygote(folder / "data", tiny_model, POLICIES=policies, ANSWER="it is so")
    process = zygote.start()
    for name in ("tone", "other"):
        zygote.client.post("/v1/adapters", **upload(tiny.adapter(folder / name, 0, 2), name)).raise_for_status()
    yield zygote
    zygote.kill(process)
    zygote.close()


@pytest.fixture(scope="module")
def run(server):
    """`run("list", "tone")`: the result of the command."""
    return lambda *words: CliRunner().invoke(data_app, [*map(str, words), "--url", str(server.client.base_url)])


def asked(server, text, **feedback) -> str:
    body = {"model": "tone", "messages": [{"role": "user", "content": text}]}
    id = server.client.post(CHAT, json=body).headers["x-request-id"]
    if feedback:
        server.client.post("/v1/feedback", json={"request_id": id, **feedback}).raise_for_status()
    return id


def test_from_traffic_to_files_to_nothing(server, run, tmp_path):
    first = asked(server, "write to jane@example.com that it rains", rating=1)
    asked(server, "how many words has a dictionary of birds?", answer="very many")
    asked(server, "why does nobody rate this one here?")
    assert eventually(lambda: run("list", "tone").stdout.count("conv-") == 3)
    assert "3" in run("list", "tone", "--json").stdout
    assert "AN ANSWER" in run("list", "tone").stdout
    built = run("build", "tone", "--since", "1h", "--held-out", 0, "--out", tmp_path / "data")
    assert built.exit_code == 0, built.output
    for words in (
        "2 examples to train on and 0 held out, of 3 requests", "1 pairs of a better and a worse answer",
        "1  nobody said anything of the answer", "1  email", f"written to {tmp_path / 'data'}", "training file: file-",
    ):  # fmt: skip
        assert words in built.stdout, built.stdout
    lines = (tmp_path / "data/train.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "[redacted]" in lines[0] and not (tmp_path / "data/held_out.jsonl").exists()
    assert json.loads((tmp_path / "data/card.json").read_text())["sources"]["train"]["corrected"] == 1
    assert run("delete", "tone", f"chatcmpl-{first}").stdout.endswith("is deleted, 1 requests\n")
    again = json.loads(run("build", "tone", "--held-out", 0, "--json").stdout)
    assert again["card"]["examples"]["train"] == 1


def test_a_version_answers_again(server, run):
    asked(server, "is this asked again?", rating=1)
    assert eventually(lambda: "conv-" in run("list", "tone").stdout)
    words = ("replay", "tone@v1", "--requests", "1", "--url", str(server.client.base_url))
    told = CliRunner().invoke(adapters_app, words)
    assert told.exit_code == 0, told.output
    assert "tone@v1 answered 1 requests; against the kept answers" in told.stdout
    assert CliRunner().invoke(adapters_app, ["replay", "tone", *words[4:]]).exit_code == 2


def test_what_cannot_be_is_a_sentence(run):
    refused = run("build", "other")
    assert refused.exit_code == 1 and "train_on_traffic: true" in refused.stderr
    assert run("list", "other").stdout == (
        "no conversation with other is kept, and none is: its policy does not say `train_on_traffic: true`\n"
    )
    assert run("build", "nobody").exit_code == 1 and run("delete", "tone", "none").exit_code == 1
    assert run("build", "tone", "--since", "soon").exit_code == 2


def test_how_far_it_is_is_a_line():
    assert _progress({"doing": "comparing", "done": 1200, "of": 5000}) == "comparing: 1,200 of 5,000"
    assert _progress({"doing": "reading", "done": 7, "of": 0}) == "reading: 7"
    assert _progress({"doing": None, "done": 0, "of": 0}) == "waiting"
