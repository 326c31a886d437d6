"""An adapter leaves a server as it came, for a folder, another server or a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import main as command
from serve.config import keys_hashed
from tests.support.backend import FakeBackend
from tests.support.served import Served
from tests.support.waiting import eventually

ADMIN = "the-operators-own-key"
CARD = "---\nauthor: team tone\nbase_model: org/base\ndatasets: [org/talks]\nlicense: mit\n---\n# Tone\n"
WHOLE = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def served(config) -> Iterator[Served]:
    with Served(replace(config, admin_keys=keys_hashed([ADMIN])), FakeBackend(config.model), ADMIN) as served:
        yield served


@pytest.fixture
def run(served):
    """`run("pull", "tone", ...)`: exit code, what it printed, and its error."""

    def run(*words: str, key: str = ADMIN):
        done = CliRunner().invoke(command.app, ["adapters", *words, "--url", served.url, "--key", key])
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def pushed(run, make_adapter):
    """Two versions, the first live, with an alias for the second."""
    for seed in (0, 1):
        (make_adapter(seed) / "README.md").write_text(CARD)
        assert run("push", "tone", str(make_adapter(seed)), *(["--no-promote"] if seed else []))[0] == 0
    assert run("alias", "tone", "next", "2")[0] == 0


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WHOLE}


def test_a_version_is_pulled_whole_with_where_it_comes_from_and_pushed_again_it_is_the_same(
    run, pushed, served, make_adapter, tmp_path
):
    for target, seed in (("tone", 0), ("tone@v2", 1), ("tone@2", 1), ("tone@next", 1)):
        folder = tmp_path / target
        code, out, error = run("pull", target, str(folder), "--json")
        assert code == 0, error
        said = json.loads(out)
        assert bytes_in(folder) == bytes_in(make_adapter(seed))
        assert run("pull", f"tone@{said['digest'][:12]}", str(tmp_path / f"{target}-digest"))[0] == 0
    assert said["version"] == 2 and said["provenance"]["trained_by"] == "team tone"
    assert run("push", "again", str(tmp_path / "tone@v2"))[0] == 0
    again = served.http.get("/v1/adapters/again/versions/1").json()
    assert again["digest"] == said["digest"]
    assert again["provenance"] == said["provenance"]
    assert "team tone" in run("show", "again")[1]

    def read():
        """What was given away; a line of it may come after the client has the file."""
        lines = [json.loads(line) for line in (served.app.state.parts.config.data_dir / "audit.jsonl").open()]
        return [line["subject"] for line in lines if line["what"] == "version_file"]

    files = [f"tone@v{version} {name}" for version in (1, 2) for name in WHOLE]
    assert eventually(lambda: all(read().count(file) >= 2 for file in files)), read()


def test_nothing_is_overwritten_and_what_fails_leaves_nothing(run, pushed, served, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("x")
    before = set(tmp_path.iterdir())
    code, _, error = run("pull", "tone", str(there))
    assert code == 2 and "is there already" in error
    assert run("pull", "tone", str(there / "mine"))[0] == 2
    assert run("pull", "tone", str(tmp_path / "no" / "parent"))[0] == 2
    for target in ("tone@v3", "tone@none", "none", "tone@", "tone@000000000000"):
        code, _, error = run("pull", target, str(tmp_path / "new"))
        assert code == 1 and "does not exist" in error, (target, error)
    blob = next((served.app.state.parts.config.data_dir / "blobs").iterdir()) / WHOLE[0]
    for file in blob.parent.parent.rglob(WHOLE[0]):
        file.write_bytes(file.read_bytes() + b" ")
    code, _, error = run("pull", "tone", str(tmp_path / "new"), "--json")
    assert code == 1 and "changes bytes" in json.loads(error)["error"]["message"]
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert (there / "mine").read_text() == "x"


def test_who_may_change_an_adapter_may_pull_it_and_nobody_else(run, pushed, served, tmp_path):
    assert run("share", "tone")[0] == 0
    keys = {
        name: served.issue(tenant, *scopes).headers["authorization"].removeprefix("Bearer ")
        for name, tenant, scopes in (
            ("own", "default", ["adapters:write"]),
            ("asks", "default", ["inference"]),
            ("other", "acme", ["adapters:write", "inference"]),
        )
    }
    assert run("pull", "tone", str(tmp_path / "own"), key=keys["own"])[0] == 0
    for name in ("asks", "other"):
        assert run("pull", "tone", str(tmp_path / name), key=keys[name])[0] == 1
        for target in ("tone", "default/tone"):
            path = f"/v1/adapters/{target.replace('/', '%2F')}/versions/1/files/{WHOLE[1]}"
            answer = served.client(keys[name]).get(path)
            assert answer.status_code == (403 if name == "asks" else 404)
    for file in ("README.md", "..%2Fadapter_config.json", "manifest.json"):
        assert served.http.get(f"/v1/adapters/tone/versions/1/files/{file}").status_code in (400, 404)


# To a hub


@pytest.fixture
def writing(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    return hub


def test_a_version_becomes_one_commit_and_a_push_from_there_knows_it_again(run, pushed, served, writing, make_adapter):
    code, out, error = run("publish", "tone@v2", "hf://team/tone", "--private", "--json")
    assert code == 0, error
    repository = writing.repositories["team/tone"]
    files = repository.commits[json.loads(out)["commit"]]
    assert {name: files[name] for name in WHOLE} == bytes_in(make_adapter(1))
    assert repository.private and repository.messages == ["tone v2"]
    assert (
        "base_model: org/base" in files["README.md"].decode() and "trained_by: team tone" in files["README.md"].decode()
    )
    assert run("push", "back", "hf://team/tone")[0] == 0
    back, first = (served.http.get(f"/v1/adapters/{name}").json()["versions"][-1] for name in ("back", "tone"))
    assert back["digest"] == first["digest"]
    assert back["provenance"] == {
        **first["provenance"], "source": "hf://team/tone", "source_version": json.loads(out)["commit"]
    }  # fmt: skip


def test_a_folder_is_published_too_and_a_card_that_is_there_stays(run, writing, make_adapter):
    (make_adapter() / "README.md").write_text(CARD)
    assert run("publish", str(make_adapter()), "hf://team/tone@next/best", "--message", "better")[0] == 0
    repository = writing.repositories["team/tone"]
    files = repository.commits[repository.names["next"]]
    assert files["best/README.md"].decode() == CARD and "best/adapter_config.json" in files
    assert "best/adapter_config.json" not in repository.commits[repository.names["main"]]
    (make_adapter() / "README.md").unlink()
    assert run("publish", str(make_adapter()), "hf://team/tone@next/best")[0] == 0
    assert repository.commits[repository.names["next"]]["best/README.md"].decode() == CARD


def test_a_hub_that_refuses_and_a_place_that_is_none_are_sentences(run, pushed, writing, monkeypatch, tmp_path):
    for place in ("s3://x/y", "hf://team", "team/tone", "hf://team/tone/../x", "hf://a/b@c d"):
        code, _, error = run("publish", "tone", place)
        assert code == 2 and "hf://org/repo" in error
    monkeypatch.setenv("HF_TOKEN", "somebody-else")
    code, _, error = run("publish", "tone", "hf://team/tone")
    assert code == 1 and "HF_TOKEN" in error and "somebody-else" not in error
    assert run("publish", "none", "hf://team/tone")[0] == 1
    assert "team/tone" not in writing.repositories
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no way")))
    code, _, error = run("publish", "tone", "hf://team/tone")
    assert code == 3 and "no way" in error
