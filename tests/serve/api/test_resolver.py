"""vLLM's resolver folder: a name that nobody pushed comes from there, through the checks of a push, as version 1."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import replace

import pytest

from serve.api import resolver
from serve.config import keys_hashed, load
from serve.errors import ConfigError
from tests.support.app import ask, issued, upload
from tests.support.waiting import settled


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    folder.mkdir()
    return folder


@pytest.fixture
def shelved(config, shelf):
    return replace(config, resolver_folder=str(shelf))


@pytest.fixture
async def asker(connect, shelved):
    async with connect(shelved) as client:
        yield client


@pytest.fixture
def put(shelf, make_adapter):
    """An adapter into the folder, under a name."""
    return lambda name="tone", **how: shutil.copytree(make_adapter(**how), shelf / name, dirs_exist_ok=True)


async def test_a_name_that_nobody_pushed_comes_from_the_folder_as_version_1(asker, put):
    assert (await ask(asker, "tone")).status_code == 404
    folder = put()
    answers = await asyncio.gather(*(ask(asker, "tone") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-loradock-version"] for answer in answers} == {"tone@v1"}
    shown = (await asker.get("/v1/adapters/tone")).json()
    assert (shown["live"], len(shown["versions"])) == (1, 1)
    assert {row["why"] for row in shown["history"]} == {f"from file://{folder}, for a request"}
    assert "tone" in {card["id"] for card in (await asker.get("/v1/models")).json()["data"]}


async def test_without_the_setting_no_folder_is_read(connect, config, put):
    put()
    async with connect(config) as client:
        assert (await ask(client, "tone")).status_code == 404


async def test_what_was_pushed_is_not_looked_for(asker, put, make_adapter):
    """The folder never changes a name that has versions, nor brings back what was unloaded."""
    await asker.post("/v1/adapters", **upload(make_adapter(3)))
    put(seed=1)
    assert (await ask(asker, "tone")).headers["x-loradock-version"] == "tone@v1"
    assert (await ask(asker, "tone@v2")).status_code == 404
    assert (await asker.post("/v1/unload_lora_adapter", json={"lora_name": "tone"})).status_code == 200
    assert (await ask(asker, "tone")).status_code == 404
    assert len((await asker.get("/v1/adapters/tone")).json()["versions"]) == 1


async def test_what_admission_refuses_is_said_and_not_tried_again_until_it_changes(asker, put, backend, monkeypatch):
    folder = put(rank=32)
    tried = []
    fetch = resolver.fetch
    monkeypatch.setattr(resolver, "fetch", lambda *a, **k: (tried.append(1), fetch(*a, **k))[1])
    for _ in range(3):
        refused = await ask(asker, "tone")
        assert refused.status_code == 422 and "rank" in refused.json()["error"]["message"]
    assert len(tried) == 1
    put()
    os.utime(folder / "adapter_config.json")
    assert (await ask(asker, "tone")).status_code == 200


async def test_what_is_remembered_of_a_refusal_keeps_no_request_alive(asker, put):
    """An exception that is raised again gets the frames of each request that meets it."""
    put(rank=32)
    looking = asker._transport.app.state.parts.inference.intake.resolver
    for _ in range(3):
        assert (await ask(asker, "tone")).status_code == 422
    ((_, error),) = looking._refused.values()
    assert error.__traceback__ is None


async def test_a_name_that_is_taken_for_now_is_looked_for_again(asker, put, make_adapter):
    await asker.post("/v1/adapters", **upload(make_adapter(1)))
    await asker.post("/v1/adapters/tone/rename", json={"to": "voice"})
    await asker.post("/v1/unload_lora_adapter", json={"lora_name": "voice"})
    put()
    assert (await ask(asker, "tone")).status_code == 409
    await asker.delete("/v1/adapters/tone")
    assert (await ask(asker, "tone")).headers["x-loradock-version"] == "tone@v1"


async def test_a_push_that_is_faster_is_what_answers(asker, put, make_adapter, monkeypatch):
    put()
    fetch = resolver.fetch

    def slow(*args, **named):
        pushing = asyncio.run_coroutine_threadsafe(asker.post("/v1/adapters", **upload(make_adapter(1))), loop)
        assert pushing.result().status_code == 201
        return fetch(*args, **named)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(resolver, "fetch", slow)
    assert (await ask(asker, "tone")).headers["x-loradock-version"] == "tone@v1"
    assert len((await asker.get("/v1/adapters/tone")).json()["versions"]) == 1


@pytest.mark.parametrize("name", ["../tone", "a/tone", ".", "..", "tone/", "/etc", "tone\0", "base@v1"])
async def test_only_a_plain_name_is_looked_for(asker, put, name):
    put()
    assert (await ask(asker, name)).status_code == 404


async def test_a_link_out_of_the_folder_is_refused_without_a_word_of_where_it_leads(
    asker, shelf, make_adapter, tmp_path
):
    (shelf / "tone").symlink_to(make_adapter().rename(tmp_path / "hidden"))
    refused = await ask(asker, "tone")
    assert refused.status_code == 403 and "hidden" not in refused.text


async def test_a_folder_without_an_adapter_is_no_model(asker, shelf):
    (shelf / "tone").mkdir()
    (shelf / "file").write_text("x")
    assert [(await ask(asker, name)).status_code for name in ("tone", "file")] == [404, 404]


async def test_fallbacks_are_looked_for_in_their_order(asker, put):
    put("second")
    body = {"models": ["first", "second", "base"], "messages": [{"role": "user", "content": "hi"}]}
    answer = await asker.post("/v1/chat/completions", json=body)
    assert answer.headers["x-loradock-version"] == "second@v1"


async def test_it_is_the_default_tenants_alone_within_its_quota_and_audited(connect, shelved, put):
    for name in ("tone", "more"):
        put(name)
    async with connect(replace(shelved, admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        acme = await issued(client, "acme", "inference")
        assert (await ask(acme, "tone")).status_code == 404
        asker = await issued(client, "default", "inference", adapters=1)
        assert (await ask(asker, "tone")).status_code == 200
        over = await ask(asker, "more")
        assert over.status_code == 429 and "1 adapters" in over.json()["error"]["message"]
        lines = [json.loads(line) for line in (shelved.data_dir / "audit.jsonl").read_text().splitlines()]
        rows = [(row["subject"], row["outcome"]) for row in lines if row["what"] == "resolve_adapter"]
        assert rows == [("tone@v1", "done"), ("more", "refused")]


async def test_a_client_that_leaves_does_not_end_what_others_wait_for(asker, put, backend):
    put()
    first = asyncio.create_task(ask(asker, "tone"))
    await asyncio.sleep(0)
    second = asyncio.create_task(ask(asker, "tone"))
    await asyncio.sleep(0.01)
    first.cancel()
    assert (await second).status_code == 200
    assert await settled(lambda: backend.held)


def test_the_folder_must_be_there():
    with pytest.raises(ConfigError, match="resolver_folder takes a folder"):
        load(["--resolver-folder", "/nowhere"], {})
