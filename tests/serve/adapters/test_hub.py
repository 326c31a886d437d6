"""A push from a hub, through the hub's own client: the commit that a name stood for, whole, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters.adapter import NOTES

REPOSITORY = "team/tone"


async def push(client, source, **more):
    return await client.post("/v1/adapters", json={"name": "tone", "source": source, **more})


def bytes_of(config, digest: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(config.data_dir, "blobs", digest).iterdir()}


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def test_an_adapter_comes_from_a_hub_and_its_history_names_the_commit(client, config, hub, make_adapter):
    sha = hub.repository(REPOSITORY).commit(make_adapter())
    done = await push(client, "hf://team/tone")
    assert (done.status_code, done.json()["live"]) == (201, True), done.text
    assert bytes_of(config, done.json()["digest"]) == bytes_in(make_adapter())
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    assert {event["why"] for event in history} == {f"from hf://team/tone (commit {sha})"}
    assert (await push(client, "hf://team/tone@main")).status_code == 200
    assert {path for path in hub.asked if "/resolve/" in path} == {
        f"/{REPOSITORY}/resolve/{sha}/{name}" for name in (*bytes_in(make_adapter()), *NOTES)
    }


async def test_a_revision_and_a_folder_are_taken_as_they_are_named(client, config, hub, make_adapter):
    repository = hub.repository(REPOSITORY)
    repository.commit(make_adapter(1), "v1.2", under="best/")
    sha = repository.commit(make_adapter(2))
    for source, folder in (
        ("hf://team/tone@v1.2/best", make_adapter(1)),
        ("hf://team/tone", make_adapter(2)),
        (f"hf://team/tone@{sha}", make_adapter(2)),
    ):
        done = await push(client, source)
        assert done.is_success, done.text
        assert bytes_of(config, done.json()["digest"]) == bytes_in(folder)


async def test_a_branch_that_moves_meanwhile_gives_one_commit_and_the_next_push_the_other(
    client, config, hub, make_adapter
):
    repository = hub.repository(REPOSITORY)
    repository.commit(make_adapter(1, rank=2))

    def move(path: str) -> None:
        if path.endswith("/adapter_config.json"):
            repository.commit(make_adapter(2, rank=4))  # of another rank: other sizes, another config

    hub.before = move
    for folder in (make_adapter(1, rank=2), make_adapter(2, rank=4)):
        done = await push(client, "hf://team/tone@main")
        assert done.status_code == 201, done.text
        assert bytes_of(config, done.json()["digest"]) == bytes_in(folder)


async def test_a_download_that_breaks_off_is_tried_once_more_and_else_leaves_nothing(client, config, hub, make_adapter):
    hub.repository(REPOSITORY).commit(make_adapter())
    hub.breaks = [500]
    done = await push(client, "hf://team/tone")
    assert done.status_code == 201, done.text
    assert bytes_of(config, done.json()["digest"]) == bytes_in(make_adapter())
    assert sum(path.startswith("/lfs/") for path in hub.asked) == 2, "nothing broke, so this proves nothing"
    hub.breaks = [100] * 10
    broken = await push(client, "hf://team/tone", name="broken")
    assert broken.status_code == 400 and "could not be fetched" in broken.json()["error"]["message"]
    assert not list((config.data_dir / "quarantine").iterdir())
    assert (await client.get("/v1/adapters/broken")).status_code == 404


async def test_the_size_limit_holds_while_bytes_arrive_from_a_hub(connect, config, hub, make_adapter):
    hub.repository(REPOSITORY).commit(make_adapter())
    nbytes = sum(map(len, bytes_in(make_adapter()).values()))
    async with connect(replace(config, max_upload_bytes=nbytes - 1)) as client:
        assert (await push(client, "hf://team/tone")).status_code == 413
    assert not list((config.data_dir / "quarantine").iterdir())


@pytest.mark.parametrize("source", ["hf://team/none", "hf://team/tone@none", "hf://team/tone/none", "hf://team/secret"])
async def test_what_is_not_there_or_not_seen_is_a_sentence_and_is_asked_again(client, hub, make_adapter, source):
    hub.repository(REPOSITORY).commit(make_adapter(), under="here/")
    hub.repository("team/secret").token = "somebody-else-s"
    absent = await push(client, source)
    assert absent.status_code == 422 and f"{source} has no adapter_config" in absent.json()["error"]["message"]
    hub.repository("team/none").commit(make_adapter())
    hub.repository("team/secret").token = None
    hub.repository("team/secret").commit(make_adapter())
    hub.repository(REPOSITORY).commit(make_adapter(), "none")
    hub.repository(REPOSITORY).commit(make_adapter(), under="none/")
    assert (await push(client, source)).status_code == 201


async def test_a_gated_repository_is_forbidden(client, hub, make_adapter):
    hub.repository(REPOSITORY).commit(make_adapter())
    hub.repository(REPOSITORY).gated = True
    assert (await push(client, "hf://team/tone")).status_code == 403


async def test_the_servers_token_reads_for_its_own_tenant_and_for_no_other(operator, issue, config, hub, make_adapter):
    private = hub.repository(REPOSITORY)
    private.token = "the-servers-own"
    private.commit(make_adapter())
    acme = await issue("acme")
    assert (await push(acme, "hf://team/tone")).status_code == 422
    assert hub.keys == {None}
    assert (await push(operator, "hf://team/tone")).status_code == 201
    assert "Bearer the-servers-own" in hub.keys
    private.token = None
    assert (await push(acme, "hf://team/tone")).status_code == 201
    assert "the-servers-own" not in json.dumps((await operator.get("/v1/adapters/tone")).json())
