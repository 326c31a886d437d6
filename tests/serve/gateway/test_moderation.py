"""/v1/moderations: a guard model or adapter says which categories a text falls into."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.config import keys_hashed, load
from serve.errors import ConfigError
from tests.support.app import issued, upload


@pytest.fixture
def says(backend):
    """What the guard answers to a text: the first of these words in it, or `none`."""
    words = {"knife": "violence, violence/graphic", "idiot": "harassment", "odd": "perhaps"}

    def say(body):
        text = body["messages"][0]["content"].rpartition("Text:")[2]
        return next((said for word, said in words.items() if word in text), "none")

    backend.say = say
    return backend


@pytest.fixture
async def guarded(connect, config, says):
    async with connect(replace(config, moderation_model="base", admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


async def test_openais_client_gets_a_result_for_each_text(guarded, says, sdk):
    answer = await sdk(guarded).moderations.create(input=["a knife", "a flower"], model="omni-moderation-latest")
    assert answer.model == "base" and answer.id.startswith("modr-")
    first, second = answer.results
    assert (first.flagged, first.categories.violence, first.categories.violence_graphic) == (True, True, True)
    assert (first.categories.harassment, first.category_scores.violence, first.category_scores.hate) == (False, 1, 0)
    assert not second.flagged and not any(second.categories.model_dump().values())
    asked = says.bodies[0]
    assert asked["temperature"] == 0 and asked["structured_outputs"]["regex"].startswith("(none|(harassment|")


async def test_parts_of_one_input_are_one_text_and_images_are_refused(guarded, says, sdk):
    parts = [{"type": "text", "text": "a flower"}, {"type": "text", "text": "and a knife"}]
    answer = await sdk(guarded).moderations.create(input=parts)
    assert len(answer.results) == 1 and answer.results[0].flagged and len(says.bodies) == 1
    with pytest.raises(openai.BadRequestError):
        await sdk(guarded).moderations.create(input=[{"type": "image_url", "image_url": {"url": "x"}}])


async def test_an_adapter_can_be_the_guard_within_the_callers_rights(guarded, says, make_adapter, sdk):
    acme, globex = await issued(guarded, "acme"), await issued(guarded, "globex")
    pushed = (await acme.post("/v1/adapters", **upload(make_adapter(), name="watch"))).json()
    answer = await sdk(acme).moderations.create(input="you idiot", model="watch")
    assert answer.model == pushed["id"] and answer.results[0].categories.harassment
    with pytest.raises(openai.NotFoundError):
        await sdk(globex).moderations.create(input="you idiot", model="watch")
    limited = await issued(guarded, "acme", requests_per_minute=1)
    await sdk(limited).moderations.create(input="x")
    with pytest.raises(openai.RateLimitError):
        await sdk(limited).moderations.create(input="x")


async def test_a_guard_with_a_head_is_asked_for_its_labels_once(guarded, says, make_adapter, sdk):
    acme = await issued(guarded, "acme")
    folder = make_adapter()
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": torch.ones(3, 16)}, folder / "adapter_model.safetensors")
    for name, labels in (("watch", ["violence", "fine", "harassment"]), ("mood", ["good", "bad", "odd"])):
        named = {**settings, "id2label": {str(number): label for number, label in enumerate(labels)}}
        (folder / "adapter_config.json").write_text(json.dumps(named))
        (await acme.post("/v1/adapters", **upload(folder, name=name, probe="false"))).raise_for_status()
    says.classify = lambda text: [0.7, 0.1, 0.6] if "knife" in text else [0.1, 0.8, 0.49]
    first, second = (await sdk(acme).moderations.create(input=["a knife", "a flower"], model="watch")).results
    assert first.categories.violence and first.categories.harassment and not first.categories.hate
    assert not second.flagged
    assert says.paths[-2:] == ["/classify", "/classify"]
    with pytest.raises(openai.BadRequestError, match="labels of the guard mood are good, bad, odd"):
        await sdk(acme).moderations.create(input="a knife", model="mood")
    says.classify = lambda text: [0.7]
    with pytest.raises(openai.InternalServerError, match="no answer that can be read"):
        await sdk(acme).moderations.create(input="a knife", model="watch")


async def test_a_guard_that_says_something_else_is_no_verdict(guarded, sdk):
    with pytest.raises(openai.InternalServerError, match="perhaps"):
        await sdk(guarded).moderations.create(input="odd")


async def test_without_a_guard_the_answer_says_how_to_name_one(client):
    refused = await client.post("/v1/moderations", json={"input": "x"})
    assert refused.status_code == 404 and "moderation_model" in refused.json()["error"]["message"]
    for wrong in ({}, {"input": []}, {"input": ["x"] * 33}, {"input": "x" * (70 << 10), "model": "base"}):
        assert (await client.post("/v1/moderations", json=wrong)).status_code == 400


@pytest.mark.parametrize("flag, value", [("categories", "a|b"), ("categories", "none"), ("prompt", "without a place")])
def test_settings_that_make_no_guard_are_refused(flag, value):
    with pytest.raises(ConfigError, match=f"moderation_{flag}"):
        load([f"--moderation-{flag}", value], {})
