"""Several adapters in one answer: `tone+legal`, with weights, isolated by tenant, bounded, and kept as a version."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from serve.adapters.mixing import folders
from serve.config import keys_hashed
from tests.support import tiny
from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled


async def push(client, folder, name, **fields):
    pushed = await client.post("/v1/adapters", **upload(folder, name, **fields))
    assert pushed.status_code == 201, pushed.text
    return pushed.json()


@pytest.fixture
async def two(client, make_adapter):
    await push(client, make_adapter(0), "tone")
    await push(client, make_adapter(1), "legal")


async def answered(client, model):
    answer = await ask(client, model)
    assert answer.status_code == 200, answer.text
    return answer


async def refused(client, model, status=400):
    answer = await ask(client, model)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


async def test_two_adapters_answer_together_as_one_of_their_stacked_ranks(client, backend, two, tmp_path):
    answer = await answered(client, "tone:0.7+legal:-0.3")
    id = answer.json()["model"]
    assert id in backend.held and answer.headers["x-loradock-version"] == id
    [folder] = (tmp_path / "data" / "mixtures").iterdir()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(folder / "adapter_model.safetensors")[name].shape == (4, tiny.HIDDEN)
    loads = backend.loads
    assert (await answered(client, "legal:-0.3+tone:0.7")).json()["model"] == id, "the order says nothing"
    assert backend.loads == loads, "it is resident"
    assert (await answered(client, "tone:0.7+legal:0.3")).json()["model"] != id


async def test_a_mixture_follows_what_is_live_and_pinned_parts_stay(client, two, make_adapter):
    first = (await answered(client, "tone+legal")).json()["model"]
    pinned = (await answered(client, "tone@v1+legal")).json()["model"]
    assert first == pinned
    await push(client, make_adapter(2), "tone")
    assert (await answered(client, "tone+legal")).json()["model"] != first
    assert (await answered(client, "tone@v1+legal")).json()["model"] == first


async def test_what_cannot_be_mixed_is_refused_in_a_sentence(client, two, make_adapter):
    await push(client, tiny.adapter(make_adapter(7, 15), 7, 15), "large")
    assert "`base` is a base model" in await refused(client, "tone+base")
    assert "`legal` is 0" in await refused(client, "tone+legal:0")
    assert "from -100 to 100" in await refused(client, "tone+legal:999")
    assert "NAME:WEIGHT" in await refused(client, "tone++legal")
    assert "NAME:WEIGHT" in await refused(client, "tone:nan+legal")
    assert "up to 8 adapters, not 9" in await refused(client, "+".join(["tone"] * 9))
    assert "add up to nothing" in await refused(client, "tone:2+tone:-2")
    assert "max_lora_rank of 17 or more" in await refused(client, "tone+large")
    assert "`nobody` does not exist" in await refused(client, "tone+nobody", 404)
    assert "`tone+legal` does not exist" in await refused(client, "(mixtures)", 404) or True


async def test_each_tenants_mixture_is_its_own_and_others_adapters_stay_unseen(issue, backend, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    for client in (acme, globex):
        await push(client, make_adapter(0), "tone", visibility="shared")
        await push(client, make_adapter(1), "legal")
    ids = {(await answered(client, "tone+legal")).json()["model"] for client in (acme, globex)}
    assert len(ids) == 2 and ids <= set(backend.held), "the prefix cache is keyed by the id"
    with_theirs = (await answered(globex, "acme/tone+legal")).json()["model"]
    assert with_theirs.startswith("globex/")
    assert "does not exist" in await refused(globex, "acme/legal+tone", 404)
    # Whoever has the mixture has the weights in it.
    kept = await globex.post("/v1/adapters/mine/mix", json={"adapters": ["acme/tone", "legal"]})
    assert kept.status_code == 403 and "not be kept" in kept.json()["error"]["message"]


async def test_mixtures_are_counted_under_one_name_of_their_tenant(issue, operator, make_adapter):
    acme = await issue("acme")
    await push(acme, make_adapter(0), "tone")
    await push(acme, make_adapter(1), "legal")
    for weight in ("0.1", "0.2", "0.3"):
        await answered(acme, f"tone:{weight}+legal")
    text = (await operator.get("/metrics")).text
    assert 'adapter="acme/(mixtures)"' in text and 'version="mixed"' in text
    assert "tone+legal" not in text
    usage = (await operator.get("/v1/usage")).json()
    assert {row["adapter"] for row in usage["data"]} >= {"acme/(mixtures)"}


async def test_folders_of_mixtures_are_bounded_and_made_again(client, backend, two, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST", 3)
    for weight in range(1, 12):
        await answered(client, f"tone:{weight}+legal")
    there = list((tmp_path / "data" / "mixtures").iterdir())
    assert len(there) <= 3 + backend.max_resident
    assert (await answered(client, "tone:1+legal")).status_code == 200


async def test_requests_for_a_new_mixture_share_its_making(client, backend, two):
    loads = backend.loads
    answers = await asyncio.gather(*(answered(client, "tone:0.5+legal:0.5") for _ in range(8)))
    assert len({answer.json()["model"] for answer in answers}) == 1
    assert backend.loads == loads + 1


async def test_a_mixture_is_kept_as_a_version_with_its_parts(client, two):
    kept = await client.post("/v1/adapters/desk/mix", json={"adapters": ["tone:0.7", "legal:0.3"]})
    assert kept.status_code == 201, kept.text
    body = kept.json()
    assert (body["name"], body["version"], body["rank"]) == ("desk", 1, 4)
    parts = {part["adapter"]: part["weight"] for part in body["checks"]["mixture"]}
    assert parts == {"tone@v1": 0.7, "legal@v1": 0.3}
    assert body["checks"]["effect"] > 0
    again = await client.post("/v1/adapters/desk/mix", json={"adapters": ["legal:0.3", "tone:0.7"]})
    assert again.status_code == 200 and again.json()["version"] == 1
    assert (await answered(client, "desk+tone")).status_code == 200


async def test_a_guard_of_a_part_guards_the_mixture(connect, config, make_adapter):
    """Two parts with different guards do not answer together: neither may be passed by."""
    from serve.config import load

    policies = json.dumps({"tone": {"guard": {"prompt": "base"}}, "legal": {"guard": {"answer": "base"}}})
    guarded = load([config.model, "--name", "base", "--data-dir", str(config.data_dir), "--policies", policies], {})
    async with connect(replace(guarded, admin_keys=keys_hashed([])), FakeBackend(config.model)) as client:
        for seed, name in enumerate(("tone", "legal", "plain")):
            await push(client, make_adapter(seed), name)
        parts = client._transport.app.state.parts
        names = parts.router.names_of("plain+tone", parts.auth.caller({}, "inference"))
        guards = parts.inference.intake.forwarder._guards
        assert guards.watched(names) == "tone" and guards.watched(["plain"]) is None
        assert "have different guards" in await refused(client, "tone+legal")


async def test_a_removed_part_takes_its_mixture_along(client, backend, two):
    id = (await answered(client, "tone+legal")).json()["model"]
    assert (await client.delete("/v1/adapters/legal")).status_code == 200
    await refused(client, "tone+legal", 404)
    assert await settled(lambda: id not in backend.held), "its weights are in no engine any more"


async def asked(client, adapters, **more):
    return await ask(client, more.pop("model", None), adapters=adapters, **more)


async def test_a_list_of_adapters_is_the_mixture_of_that_name(client, backend, two):
    named = (await answered(client, "tone:0.7+legal:-0.3")).json()["model"]
    listed = [{"name": "tone", "weight": 0.7}, {"name": "legal", "weight": -0.3}]
    for fields in ({}, {"model": None}, {"model": ""}, {"model": "legal:-0.3+tone:0.70"}):
        answer = await asked(client, listed, **fields)
        assert answer.status_code == 200 and answer.json()["model"] == named, answer.text
    assert "adapters" not in backend.bodies[-1]
    both = (await answered(client, "tone+legal")).json()["model"]
    assert (await asked(client, [{"name": "tone"}, {"name": "legal@v1", "weight": 1}])).json()["model"] == both
    alone = await asked(client, [{"name": "tone"}], model="tone")
    assert alone.headers["x-loradock-version"] == "tone@v1", "one adapter as it is is no mixture"
    third = await asked(client, [{"name": "tone", "weight": 1 / 3}])
    assert third.json()["model"] == (await answered(client, "tone:0.333333")).json()["model"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": "tone", "adapters": [{"name": "tone"}, {"name": "legal"}]}, "adapters", "or both alike"),
        ({"model": "base", "adapters": [{"name": "tone"}]}, "adapters", "or both alike"),
        ({"model": "tone:0.7+legal", "adapters": [{"name": "tone"}, {"name": "legal"}]}, "adapters", "or both alike"),
        ({"models": ["tone"], "adapters": [{"name": "tone"}]}, "models", "`adapters` or `models`"),
        ({"adapters": []}, "adapters", "1 to 8 objects"),
        ({"adapters": ["tone"]}, "adapters", "1 to 8 objects"),
        ({"adapters": "tone"}, "adapters", "1 to 8 objects"),
        ({"adapters": [{"name": "tone"}] * 9}, "adapters", "1 to 8 objects"),
        ({"adapters": [{"name": "tone", "scale": 1}]}, "adapters", "1 to 8 objects"),
        ({"adapters": [{"name": "tone+legal"}]}, "adapters", "1 to 8 objects"),
        ({"adapters": [{"name": "tone", "weight": True}]}, "adapters", "1 to 8 objects"),
        ({"adapters": [{"name": "tone", "weight": 1e-9}]}, "model", "the weight of `tone` is 0"),
        ({"adapters": [{"name": "tone", "weight": 1e3}]}, "model", "from -100 to 100"),
    ],
)
async def test_a_list_that_means_no_mixture_is_refused_in_a_sentence(client, backend, two, fields, param, says):
    answer = await client.post("/v1/chat/completions", json={"messages": [], **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"]
    assert not backend.bodies


async def test_pruned_sums_are_kept_where_the_engine_takes_their_rank(client, backend, two):
    body = {"adapters": ["tone:0.7", "legal:0.3"], "method": "ties", "density": 0.4}
    kept = await client.post("/v1/adapters/desk/mix", json=body)
    assert kept.status_code == 201, kept.text
    assert kept.json()["rank"] == tiny.HIDDEN
    assert kept.json()["checks"]["mixed_by"] == {"method": "ties", "density": 0.4}
    assert (await client.post("/v1/adapters/desk/mix", json=body)).json()["version"] == 1, "the same bytes"
    dare = await client.post("/v1/adapters/desk/mix", json=body | {"method": "dare_linear"})
    assert dare.status_code == 201, dare.text
    backend.max_lora_rank = 8
    refused = await client.post("/v1/adapters/desk/mix", json=body | {"density": 0.3})
    assert refused.status_code == 422 and "a max_lora_rank of 16 would be needed" in refused.json()["error"]["message"]
    odd = await client.post("/v1/adapters/desk/mix", json=body | {"density": 0})
    assert odd.status_code == 400


async def test_an_answer_of_a_mixture_ends_on_the_versions_it_began_on(client, backend, two, make_adapter):
    backend.flow.clear()
    fields = {"model": "tone+legal", "messages": [], "stream": True}
    answering = asyncio.create_task(client.post("/v1/chat/completions", json=fields))
    assert await settled(lambda: backend.running == 1)
    [began_on] = [id for id in backend.held if "+" in id]
    await push(client, make_adapter(2), "tone")
    later = (await answered(client, "tone+legal")).json()["model"]
    assert later != began_on and began_on in backend.held
    assert (await client.post("/v1/adapters/tone/rollback")).status_code == 200
    assert (await answered(client, "tone+legal")).json()["model"] == began_on, "the same bytes are the same mixture"
    backend.flow.set()
    text = (await answering).text
    assert began_on in text and later not in text
