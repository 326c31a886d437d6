"""vLLM's runtime LoRA API and SageMaker's adapter routes: its words, over versions that are judged and kept."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from serve.config import keys_hashed
from tests.support import tiny
from tests.support.app import ask, upload
from tests.support.waiting import settled


@pytest.fixture
def rooted(config, tmp_path):
    return replace(config, source_roots=(str(tmp_path),))


@pytest.fixture
async def loader(connect, rooted):
    """A client of a server that takes folders below the test's own."""
    async with connect(rooted) as client:
        yield client


@pytest.fixture
async def guarded(connect, rooted):
    """The same with an admin key."""
    async with connect(replace(rooted, admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


async def load(client, path, name="tone", **more):
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


async def unload(client, name="tone"):
    return await client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def vllm_error(answer) -> tuple[int, str, str]:
    """Status, type and message of an error in vLLM's shape, whose code is its status."""
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (answer.status_code, None)
    return answer.status_code, error["type"], error["message"]


async def test_a_load_by_path_answers_in_vllms_words_and_is_a_version(loader, make_adapter):
    done = await load(loader, make_adapter())
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'tone' added successfully.")
    assert done.headers["x-loradock-version"] == "tone@v1"
    shown = (await loader.get("/v1/adapters/tone")).json()
    assert (shown["live"], shown["versions"][0]["checks"]["loaded_from"]) == (1, f"file://{make_adapter()}")
    assert (await ask(loader, "tone")).json() == {"model": shown["versions"][0]["id"]}
    assert [row["why"] for row in shown["history"]] == [f"from file://{make_adapter()}"] * 2


@pytest.mark.parametrize("inplace", [False, True])
async def test_another_load_under_a_name_is_another_version_and_live(loader, make_adapter, inplace):
    for seed, version in ((0, 1), (1, 2), (1, 2), (0, 1)):
        done = await load(loader, make_adapter(seed), load_inplace=inplace)
        assert (done.status_code, done.headers["x-loradock-version"]) == (200, f"tone@v{version}")
        assert (await loader.get("/v1/adapters/tone")).json()["live"] == version


async def test_an_answer_under_way_ends_on_the_weights_it_began_with(loader, backend, make_adapter):
    await load(loader, make_adapter(0))
    old = (await loader.get("/v1/adapters/tone")).json()["versions"][0]["id"]
    backend.flow.clear()
    answering = asyncio.create_task(ask(loader, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    await load(loader, make_adapter(1), load_inplace=True)
    assert (await unload(loader)).status_code == 200
    backend.flow.set()
    models = [json.loads(row[6:])["model"] for row in (await answering).text.splitlines() if row.startswith("data: {")]
    assert models == [old, old]


async def test_an_unloaded_name_answers_404_until_it_comes_back(loader, backend, make_adapter):
    await load(loader, make_adapter())
    done = await unload(loader)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'tone' removed successfully.")
    assert (await ask(loader, "tone")).status_code == 404
    assert "tone" not in {card["id"] for card in (await loader.get("/v1/models")).json()["data"]}
    assert await settled(lambda: not backend.held)
    absent = (404, "NotFoundError", "The lora adapter 'tone' cannot be found.")
    assert vllm_error(await unload(loader)) == absent
    # Its version is there by number, and a rollback, a promote or another load makes it live again.
    assert (await ask(loader, "tone@v1")).status_code == 200
    assert (await loader.post("/v1/adapters/tone/rollback")).json()["version"] == 1
    assert (await unload(loader)).status_code == 200
    assert (await loader.post("/v1/adapters/tone/promote", json={"version": 1})).status_code == 200
    assert (await unload(loader)).status_code == 200
    assert (await load(loader, make_adapter())).headers["x-loradock-version"] == "tone@v1"
    assert (await ask(loader, "tone")).status_code == 200
    history = [row["what"] for row in (await loader.get("/v1/adapters/tone")).json()["history"]]
    assert history == ["add", "promote", "unload", "rollback", "unload", "promote", "unload", "promote"]
    # There is nothing before it: a rollback to itself would go nowhere.
    assert (await loader.post("/v1/adapters/tone/rollback")).status_code == 409


async def test_an_unload_ends_a_canary_too(loader, make_adapter):
    await load(loader, make_adapter(0))
    await loader.post("/v1/adapters", **upload(make_adapter(1), promote="false"))
    await loader.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
    assert (await unload(loader)).status_code == 200
    shown = (await loader.get("/v1/adapters/tone")).json()
    assert (shown["live"], shown["canary"]) == (None, None)
    assert [(await ask(loader, "tone")).status_code for _ in range(8)] == [404] * 8


async def test_a_change_that_expects_another_version_changes_nothing(loader, make_adapter):
    await load(loader, make_adapter(0))
    stale = {"if-match": '"7"'}
    body = {"lora_name": "tone", "lora_path": str(make_adapter(1))}
    assert (await loader.post("/v1/load_lora_adapter", json=body, headers=stale)).status_code == 409
    assert (await loader.post("/v1/unload_lora_adapter", json=body, headers=stale)).status_code == 409
    assert (await loader.get("/v1/adapters/tone")).json()["live"] == 1


async def test_what_vllm_refuses_is_refused_in_its_words(loader, make_adapter, tmp_path):
    both = (400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    for body in ({}, {"lora_name": "tone"}, {"lora_path": "/x"}, {"lora_name": "", "lora_path": "/x"}):
        assert vllm_error(await loader.post("/v1/load_lora_adapter", json=body)) == both
    conflict = (400, "InvalidUserInput", "The lora adapter 'base' conflicts with a served base model.")
    assert vllm_error(await load(loader, make_adapter(), "base")) == conflict
    needed = (400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
    assert vllm_error(await unload(loader, "")) == needed
    for absent in (tmp_path / "absent", tmp_path):
        words = (404, "NotFoundError", f"Loading lora tone failed: No adapter found for {absent}")
        assert vllm_error(await load(loader, absent)) == words
    assert (await loader.get("/v1/adapters")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"lora_path": "./here"}, "absolute path"),
        ({"lora_path": "~/here"}, "absolute path"),
        ({"lora_path": "here"}, "absolute path"),
        ({"lora_path": "ftp://x/y"}, "hf://"),
        ({"lora_path": "https://example.org/tone"}, "source_hosts"),
        ({"lora_path": "/a/../b"}, "cannot be read"),
        ({"lora_path": 3}, "lora_path"),
        ({"lora_name": "a/b"}, "letters, digits"),
        ({"lora_name": "../b"}, "letters, digits"),
        ({"lora_name": "tone@v1"}, "letters, digits"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
    ],
)
async def test_what_cannot_be_loaded_is_a_sentence(loader, make_adapter, body, word):
    refused = await load(loader, make_adapter(), **body)
    assert refused.status_code == 400 and word in refused.json()["error"]["message"]


async def test_what_does_not_fit_the_base_is_refused_as_in_an_upload(loader, make_adapter):
    refused = await load(loader, make_adapter(rank=32))
    assert refused.status_code == 422 and "rank" in refused.json()["error"]["message"]


async def test_without_a_root_no_path_is_read_and_the_answer_says_how_to_allow_one(client, make_adapter, tmp_path):
    answers = [await load(client, path) for path in (make_adapter(), tmp_path / "absent", "/etc")]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert all("LORADOCK_SOURCE_ROOTS" in answer.json()["error"]["message"] for answer in answers)


async def test_a_path_that_leads_out_of_the_roots_says_nothing_of_where_it_leads(
    connect, config, make_adapter, tmp_path
):
    root, outside = tmp_path / "root", make_adapter().rename(tmp_path / "hidden-elsewhere")
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "hidden-nowhere")
    async with connect(replace(config, source_roots=(str(root),))) as client:
        for path in (root / "link", root / "dangling", outside, f"{root}x", "/"):
            refused = await load(client, path)
            assert refused.status_code == 403, path
            assert "hidden" not in refused.text.replace(str(path), "")
        inside = root / "inside"
        inside.mkdir()
        (inside / "adapter_config.json").symlink_to(outside / "adapter_config.json")
        (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
        refused = await load(client, inside)
        assert refused.status_code == 422 and "hidden" not in refused.text


async def test_an_adapter_that_changes_nothing_yet_is_loaded(loader, backend, make_adapter):
    backend.effects["tone"] = 0.0
    for more in ({}, {"probe_min_effect": "0"}):
        refused = await loader.post("/v1/adapters", **upload(make_adapter(), **more))
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_effect")
        refused = await loader.post("/v1/adapters", **upload(tiny.untrained(make_adapter()), **more))
        assert refused.status_code == 422 and "is zero" in refused.json()["error"]["message"]
    assert (await load(loader, tiny.untrained(make_adapter()))).status_code == 200
    checks = (await loader.get("/v1/adapters/tone")).json()["versions"][0]["checks"]
    assert (checks["effect"], checks["effect_needed"]) == (0.0, 0.0)
    assert (await loader.post("/v1/adapters", **upload(make_adapter(1), probe="false"))).status_code == 201
    odd = await loader.post("/v1/adapters", **upload(make_adapter(2), probe="maybe"))
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "probe")


async def test_names_that_a_trainer_left_behind_are_removed_and_no_others(connect, rooted, make_adapter):
    async with connect(replace(rooted, keep_unloaded=2)) as client:
        await client.post("/v1/adapters", **upload(make_adapter(9), name="pushed"))
        assert (await unload(client, "pushed")).status_code == 200
        for step in range(6):
            assert (await load(client, make_adapter(step), f"policy-v{step}")).status_code == 200
            if step:
                assert (await unload(client, f"policy-v{step - 1}")).status_code == 200
        names = [row["name"] for row in (await client.get("/v1/adapters")).json()["data"]]
        assert names == ["policy-v3", "policy-v4", "policy-v5", "pushed"]
        assert (await client.get("/v1/adapters/policy-v0")).status_code == 404
        assert (await load(client, make_adapter(0), "policy-v0")).headers["x-loradock-version"] == "policy-v0@v2"
        history = (await client.get("/v1/adapters/policy-v0")).json()["history"]
        assert [row["what"] for row in history] == ["add", "promote", "unload", "delete", "add", "promote"]
        assert (await client.post("/v1/adapters/pushed/rollback")).status_code == 200


async def test_a_policy_that_tries_versions_first_holds_for_loads_too(connect, rooted, make_adapter):
    from serve.rollout.policy import Policy

    async with connect(replace(rooted, policies=(Policy(canary_weight=0.5),))) as client:
        for seed in (0, 1):
            assert (await load(client, make_adapter(seed))).status_code == 200
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (1, {"version": 2, "weight": 0.5})


# Who may


async def issued(guarded, tenant, *scopes, **limits):
    from tests.support.app import issued

    return await issued(guarded, tenant, *scopes, **limits)


ROUTES = [
    ("POST", "/v1/load_lora_adapter", {"lora_name": "tone", "lora_path": "/x"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "tone"}),
    ("POST", "/adapters", {"name": "tone", "src": "/x"}),
    ("DELETE", "/adapters/tone", None),
    ("POST", "/pause", None),
    ("POST", "/resume", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_it_takes_the_scope_of_an_upload(guarded, method, path, body):
    asker = await issued(guarded, "default", "inference")
    assert (await asker.request(method, path, json=body)).status_code == 403
    asker.headers.pop("authorization")
    assert (await asker.request(method, path, json=body)).status_code == 401


async def test_another_tenant_reads_no_folder_of_the_server_and_touches_no_foreign_name(guarded, make_adapter):
    assert (await load(guarded, make_adapter())).status_code == 200
    acme = await issued(guarded, "acme")
    for path in (make_adapter(), make_adapter() / "absent"):
        assert (await load(acme, path)).status_code == 403
    absent = (404, "NotFoundError", "The lora adapter 'tone' cannot be found.")
    assert vllm_error(await unload(acme)) == absent
    assert vllm_error(await unload(acme, "default/tone"))[0] == 404
    assert (await acme.delete("/adapters/tone")).status_code == 404
    assert (await ask(guarded, "tone")).status_code == 200
    assert (await acme.post("/v1/adapters", **upload(make_adapter(1)))).status_code == 201
    assert (await unload(acme)).status_code == 200
    assert (await ask(acme, "tone")).status_code == 404
    assert (await ask(guarded, "tone")).status_code == 200


async def test_loads_count_for_the_quota_and_are_audited(guarded, make_adapter, rooted):
    trainer = await issued(guarded, "default", "adapters:write", adapters=1)
    assert (await load(trainer, make_adapter())).status_code == 200
    over = await load(trainer, make_adapter(1), "more")
    assert over.status_code == 429 and "1 adapters" in over.json()["error"]["message"]
    assert (await unload(trainer)).status_code == 200
    lines = [json.loads(line) for line in (rooted.data_dir / "audit.jsonl").read_text().splitlines()]
    rows = [(row["what"], row["subject"], row["outcome"]) for row in lines if "lora" in row["what"]]
    assert rows == [
        ("load_lora_adapter", "tone@v1", "done"),
        ("load_lora_adapter", "more", "refused"),
        ("unload_lora_adapter", "tone@v1", "done"),
    ]


# SageMaker's


async def test_sagemakers_routes_load_and_unload(loader, make_adapter):
    body = {"name": "tone", "src": str(make_adapter())}
    done = await loader.post("/adapters", json={**body, "preload": True, "pin": False})
    assert (done.status_code, done.text) == (200, "Adapter tone registered")
    assert (await ask(loader, "tone")).status_code == 200
    gone = await loader.delete("/adapters/tone", headers={"X-Amzn-SageMaker-Adapter-Alias": "greeting"})
    assert (gone.status_code, gone.text) == (200, "Adapter greeting unregistered")
    assert (await ask(loader, "tone")).status_code == 404
    assert vllm_error(await loader.delete("/adapters/tone"))[:2] == (404, "NotFoundError")
    # Without a body what it takes is in the query.
    assert (await loader.post("/adapters", params=body)).text == "Adapter tone registered"
    for odd in ({"name": "", "src": "/x"}, {"name": "tone"}, {"src": "/x"}):
        assert (await loader.post("/adapters", json=odd)).status_code == 400
        assert (await loader.post("/adapters", params=odd)).status_code == 400


async def test_sagemakers_pin_keeps_the_name_in_memory(loader, make_adapter):
    assert (await loader.post("/adapters", json={"name": "tone", "src": str(make_adapter()), "pin": True})).is_success
    assert (await loader.get("/v1/adapters/tone")).json()["versions"][0]["pinned"]
