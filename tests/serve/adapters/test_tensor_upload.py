"""A push of tensors alone: no file on the sender's side, and the same judgement as of any upload."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save

from tests.support.app import ask, issued, upload

GOOD = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'


@pytest.fixture
def tensors(make_adapter):
    return load_file(make_adapter() / "adapter_model.safetensors")


@pytest.fixture
def settings(make_adapter):
    return (make_adapter() / "adapter_config.json").read_text()


async def push(client, body, config=None, kind="application/octet-stream", **query):
    headers = {"content-type": kind} | ({} if config is None else {"x-adapter-config": config})
    return await client.post("/v1/adapters", params={"name": "tone", **query}, content=body, headers=headers)


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/vnd.safetensors"])
async def test_tensors_with_their_configuration_in_a_header_are_a_version(client, tensors, settings, kind):
    done = await push(client, save(tensors), settings, kind, why="step 1")
    assert (done.status_code, done.json()["version"], done.json()["live"]) == (201, 1, True), done.text
    assert (await ask(client, "tone")).headers["x-loradock-version"] == "tone@v1"
    assert (await client.get("/v1/adapters/tone")).json()["history"][0]["why"] == "step 1"


async def test_the_configuration_may_be_in_the_metadata_of_the_tensors(client, tensors, settings):
    done = await push(client, save(tensors, metadata={"adapter_config": settings}))
    assert done.status_code == 201, done.text
    assert (await push(client, save(tensors, metadata={"adapter_config": settings}))).status_code == 200


async def test_the_same_bytes_are_the_same_version_as_in_files(client, settings, make_adapter):
    folder = make_adapter()
    filed = await client.post("/v1/adapters", **upload(folder))
    sent = await push(client, (folder / "adapter_model.safetensors").read_bytes(), settings)
    assert (sent.status_code, sent.json()["digest"]) == (200, filed.json()["digest"])


async def test_the_names_that_peft_uses_inside_are_taken(client, tensors, settings):
    inner = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    assert (await push(client, save(inner), settings)).status_code == 201


async def test_the_query_says_what_a_form_says(client, tensors, settings, backend):
    await push(client, save(tensors), settings)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    waiting = await push(client, save(other), settings, promote="false", visibility="shared", probe_min_effect="0.2")
    assert (waiting.status_code, waiting.json()["live"], waiting.json()["visibility"]) == (201, False, "shared")
    backend.effects["tone"] = 0.0
    third = {name: tensor + 2 for name, tensor in tensors.items()}
    assert (await push(client, save(third), settings)).status_code == 422
    assert (await push(client, save(third), settings, probe="false")).status_code == 201
    for query in (
        {"promote": "maybe"},
        {"visibility": "all"},
        {"probe_min_effect": "high"},
        {"name": ""},
        {"name": "a/b"},
    ):
        assert (await push(client, save(tensors), settings, **query)).status_code == 400, query


@pytest.mark.parametrize(
    ("body", "header", "status", "word"),
    [
        (b"", "{}", 400, "empty"),
        (b"nothing", GOOD, 422, "safetensors"),
        (b"\x80\x04cos\nsystem\n", GOOD, 422, "pickle"),
        (None, None, 400, "x-adapter-config"),
        (None, "", 400, "x-adapter-config"),
        (None, "{", 422, "JSON"),
        (None, "[]", 422, "JSON object"),
        (None, '{"peft_type": "LORA"}', 422, "lora_alpha"),
        (None, b"\xff", 422, "JSON"),
    ],
)
async def test_what_is_no_adapter_is_a_sentence(client, config, tensors, body, header, status, word):
    refused = await push(client, save(tensors) if body is None else body, header)
    assert refused.status_code == status and word in refused.text, refused.text
    assert not list((config.data_dir / "quarantine").iterdir())


async def test_metadata_that_is_no_text_is_a_sentence(client, tensors):
    refused = await push(client, save(tensors, metadata={"adapter_config": "{\ud7ff"}))
    assert refused.status_code == 422
    header = json.dumps({"__metadata__": {"adapter_config": "\ud800"}}).encode()
    odd = len(header).to_bytes(8, "little") + header
    assert (await push(client, odd)).status_code == 422


async def test_the_size_limit_holds_while_bytes_arrive(connect, config, tensors, settings):
    body = save({**tensors, "more": tensors[next(iter(tensors))].repeat(4096, 1)})

    async def chunks():
        for at in range(0, len(body), 4096):
            yield body[at : at + 4096]

    async with connect(replace(config, max_upload_bytes=100_000)) as client:
        for content in (body, chunks()):
            assert (await push(client, content, settings)).status_code == 413
    assert not list((config.data_dir / "quarantine").iterdir())


async def test_tensors_take_the_scope_of_an_upload_and_count_for_the_quota(operator, tensors, settings):
    asker = await issued(operator, "acme", "inference")
    assert (await push(asker, save(tensors), settings)).status_code == 403
    trainer = await issued(operator, "acme", "adapters:write", adapters=1)
    done = await push(trainer, save(tensors), settings)
    assert (done.status_code, done.json()["tenant"]) == (201, "acme")
    assert (await push(trainer, save(tensors), settings, name="more")).status_code == 429


async def test_a_trainer_says_how_many_of_its_versions_stay(client, tensors, settings):
    async def step(number, **query):
        body = save({name: tensor + number for name, tensor in tensors.items()})
        done = await push(client, body, settings, **query)
        assert done.status_code == 201, done.text
        return [version["version"] for version in (await client.get("/v1/adapters/tone")).json()["versions"]]

    for number in range(1, 5):
        await step(number)
    await client.post("/v1/adapters/tone/pin", json={"version": 2})
    # The newest two, the one that is pinned, and the one that a rollback would make live.
    assert await step(5, keep="2") == [2, 4, 5]
    assert await step(6, keep="1") == [2, 5, 6]
    assert await step(7, keep="1", promote="false") == [2, 5, 6, 7]
    assert (await client.post("/v1/adapters/tone/rollback")).json()["version"] == 5
    assert (await ask(client, "tone")).headers["x-loradock-version"] == "tone@v5"
    for odd in ("0", "-1", "many"):
        assert (await push(client, save(tensors), settings, keep=odd)).status_code == 400
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    assert {row["why"] for row in history if row["what"] == "delete"} == {
        "the newest 2 are kept",
        "the newest 1 are kept",
    }
