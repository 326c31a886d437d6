"""What is pinned stays in the engine, whoever else comes."""

from __future__ import annotations

import pytest

from tests.support.app import upload
from tests.support.waiting import settled


async def push(client, make_adapter, name, seed, **fields):
    return (await client.post("/v1/adapters", **upload(make_adapter(seed), name=name, **fields))).json()["id"]


async def crowd(client, make_adapter, count=8):
    """More adapters than the engine holds; what they push out has left."""
    for seed in range(count):
        await push(client, make_adapter, f"guest-{seed}", 100 + seed)
    engine = client._transport.app.state.parts.fleet.first.engine
    backend = engine.backend
    assert await settled(lambda: not engine._leaving and len(backend.held) <= backend.max_resident)


async def pin(client, name="tone", **body):
    return await client.post(f"/v1/adapters/{name}/pin", json=body)


async def test_a_pinned_adapter_outstays_the_crowd_and_an_unpinned_one_does_not(client, backend, make_adapter):
    stays = await push(client, make_adapter, "tone", 0)
    goes = await push(client, make_adapter, "other", 1)
    assert (await pin(client)).json()["versions"][0]["pinned"] is True
    await crowd(client, make_adapter)
    assert stays in backend.held and goes not in backend.held
    assert len(backend.held) <= backend.max_resident, "the engine's own memory could have pushed it out"
    assert (await client.delete("/v1/adapters/tone/pin")).json()["versions"][0]["pinned"] is False
    await crowd(client, make_adapter)
    assert stays not in backend.held


async def test_a_pin_follows_the_live_version(client, backend, make_adapter):
    old = await push(client, make_adapter, "tone", 0)
    await pin(client)
    new = await push(client, make_adapter, "tone", 1)
    await crowd(client, make_adapter)
    assert new in backend.held and old not in backend.held


async def test_a_pin_of_a_version_holds_that_version_live_or_not(client, backend, make_adapter):
    old = await push(client, make_adapter, "tone", 0)
    new = await push(client, make_adapter, "tone", 1)
    assert [v["pinned"] for v in (await pin(client, version=1)).json()["versions"]] == [True, False]
    await crowd(client, make_adapter)
    assert old in backend.held and new not in backend.held


async def test_one_place_always_stays_free(client, backend, make_adapter):
    for seed in range(4):
        await push(client, make_adapter, f"tone-{seed}", seed)
    answers = [(await pin(client, f"tone-{seed}")).status_code for seed in range(4)]
    assert answers == [200, 200, 200, 409]
    assert (await pin(client, "tone-0")).status_code == 200, "it is pinned already"
    assert "unpin one" in (await pin(client, "tone-3")).json()["error"]["message"]
    await crowd(client, make_adapter)
    asked = await client.post("/v1/chat/completions", json={"model": "tone-3"})
    assert asked.status_code == 200


async def test_a_pin_survives_a_restart_and_is_loaded_before_the_server_is_ready(
    connect, config, backend, make_adapter
):
    async with connect(config) as client:
        await crowd(client, make_adapter)
        last = await push(client, make_adapter, "zulu", 0)
        await pin(client, "zulu")
    backend.held.clear()
    backend.numbers.clear()
    async with connect(config) as client:
        assert last in backend.held
        await crowd(client, make_adapter)
        assert last in backend.held


async def test_a_deleted_version_is_pinned_no_more(client, backend, make_adapter):
    await push(client, make_adapter, "tone", 0)
    gone = await push(client, make_adapter, "tone", 1, promote="false")
    await pin(client, version=2)
    await client.delete("/v1/adapters/tone/versions/2")
    assert await settled(lambda: gone not in backend.held)
    assert not any(v["pinned"] for v in (await client.get("/v1/adapters/tone")).json()["versions"])


@pytest.mark.parametrize(("name", "body", "status"), [("nobody", {}, 404), ("tone", {"version": 9}, 404)])
async def test_what_is_not_there_cannot_be_pinned(client, make_adapter, name, body, status):
    await push(client, make_adapter, "tone", 0)
    assert (await pin(client, name, **body)).status_code == status


async def test_a_popular_adapter_that_was_pushed_out_comes_back(client, backend, make_adapter, monkeypatch):
    monkeypatch.setattr("serve.rollout.prefetch.PREFETCH_SECONDS", 0.02)
    loved = await push(client, make_adapter, "loved", 0)
    for _ in range(20):
        await client.post("/v1/chat/completions", json={"model": "loved"})
    for seed in range(4):
        await push(client, make_adapter, f"guest-{seed}", 100 + seed)
    assert await settled(lambda: loved in backend.held)


async def test_after_a_restart_the_popular_are_there_first(connect, config, backend, make_adapter):
    async with connect(config) as client:
        await crowd(client, make_adapter)
        loved = await push(client, make_adapter, "zulu", 0)
        for _ in range(20):
            await client.post("/v1/chat/completions", json={"model": "zulu"})
    backend.held.clear()
    backend.numbers.clear()
    async with connect(config):
        assert loved in backend.held


async def test_a_tenant_pins_only_its_part(operator, issue, backend, make_adapter):
    acme = await issue("acme")
    for seed in range(2):
        await push(acme, make_adapter, f"tone-{seed}", seed)
    assert (await pin(acme, "tone-0")).status_code == 200
    refused = await pin(acme, "tone-1")
    assert refused.status_code == 429 and "unpin one" in refused.json()["error"]["message"]
    assert (await pin(acme, "tone-0")).status_code == 200
