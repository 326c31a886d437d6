"""A change of an adapter waits for transactions, and for nobody's bytes, probe or engine."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace

import pytest

from serve.engine.engine import Phase
from serve.errors import EngineUnavailable
from serve.rollout.change_locks import ChangeLocks
from tests.support.app import ask, push_two, upload
from tests.support.waiting import settled


@pytest.fixture
async def shared(connect, config, tmp_path):
    """A client of a server that puts adapters where others see them too."""
    both = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")
    async with connect(both) as client:
        yield client


def parts_of(client):
    return client._transport.app.state.parts


def hang(monkeypatch, client, backend, where, name):
    """Pushes whose version is called `name` hang there until the answer is set."""
    go = threading.Event()
    store = parts_of(client).store
    if where == "upload":
        put = store.shared.put
        monkeypatch.setattr(store.shared, "put", lambda digest, folder: (go.wait(120), put(digest, folder)))
    elif where == "hash":
        admit = store.admit
        monkeypatch.setattr(store, "admit", lambda *args, **more: (go.wait(120), admit(*args, **more))[1])
    else:
        step = getattr(backend, where)

        async def waits(adapter_id, *args):
            while adapter_id and adapter_id.startswith(f"{name}@") and not go.is_set():
                await asyncio.sleep(0.01)
            return await step(adapter_id, *args)

        monkeypatch.setattr(backend, where, waits)
    return go


@pytest.mark.parametrize("where", ["hash", "add", "probe", "upload"])
@pytest.mark.parametrize("name", ["other", "tone"])
async def test_an_automatic_rollback_waits_for_nobodys_push(shared, backend, make_adapter, monkeypatch, where, name):
    await push_two(shared, make_adapter)
    await shared.post("/v1/adapters/tone/promote", json={"version": 2})
    go = hang(monkeypatch, shared, backend, where, name)
    pushing = asyncio.create_task(shared.post("/v1/adapters", **upload(make_adapter(7), name)))
    await asyncio.sleep(0.3)
    verdict = await asyncio.wait_for(parts_of(shared).automatic_rollback.rollback("tone", 2, "errors", {}), 60)
    assert verdict.done, verdict.message
    assert not pushing.done()
    assert (await shared.get("/v1/adapters/tone")).json()["live"] == 1
    go.set()
    pushed = await pushing
    assert pushed.status_code == 201, pushed.text
    assert (await ask(shared, name)).json() == {"model": pushed.json()["id"]}


async def test_a_rollback_waits_for_no_engine(connect, config, backend, make_adapter):
    async with connect(replace(config, restart_wait=30.0)) as client:
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        backend.prepare = lambda heir: setattr(heir, "start", asyncio.Event().wait)
        backend.dead = True
        base = parts_of(client).fleet.first
        assert await settled(lambda: base.phase is Phase.RESTARTING)
        told = await asyncio.wait_for(client.post("/v1/adapters/tone/rollback"), 20)
        assert (told.status_code, told.json()["version"]) == (200, 1)


async def test_two_pushes_at_once_do_not_pass_a_quota_together(issue, make_adapter):
    acme = await issue("acme", adapters=1)
    told = await asyncio.gather(
        *(acme.post("/v1/adapters", **upload(make_adapter(seed), f"tone-{seed}")) for seed in range(4))
    )
    assert sorted(one.status_code for one in told) == [201, 429, 429, 429]


async def test_two_pins_at_once_do_not_take_the_same_place(client, backend, make_adapter):
    for seed in range(4):
        await client.post("/v1/adapters", **upload(make_adapter(seed), f"tone-{seed}"))
    told = await asyncio.gather(*(client.post(f"/v1/adapters/tone-{seed}/pin") for seed in range(4)))
    assert sorted(one.status_code for one in told) == [200, 200, 200, 409]


async def test_the_same_bytes_pushed_twice_at_once_are_one_version_and_stay(client, config, make_adapter):
    told = await asyncio.gather(*(client.post("/v1/adapters", **upload(make_adapter())) for _ in range(4)))
    assert sorted(one.status_code for one in told) == [200, 200, 200, 201]
    await parts_of(client).lifecycle.settle()
    assert parts_of(client).store.has(told[0].json()["digest"])


async def test_bytes_that_a_push_is_about_to_register_outlive_the_removal_of_another_adapter_with_them(
    client, backend, make_adapter, monkeypatch
):
    old = (await client.post("/v1/adapters", **upload(make_adapter(), "old"))).json()
    go = hang(monkeypatch, client, backend, "probe", "new")
    pushing = asyncio.create_task(client.post("/v1/adapters", **upload(make_adapter(), "new")))
    assert await settled(lambda: parts_of(client).fleet.first.leases == 1)
    await client.delete("/v1/adapters/old")
    assert await settled(lambda: old["id"] not in backend.held)
    go.set()
    assert (await pushing).status_code == 201
    await parts_of(client).lifecycle.settle()
    assert parts_of(client).store.has(old["digest"])


async def test_a_push_that_a_base_swap_overtakes_is_judged_on_the_new_base(
    client, backend, make_adapter, monkeypatch, tiny_model, tmp_path
):
    export = shutil.copytree(tiny_model, tmp_path / "export")
    go = hang(monkeypatch, client, backend, "probe", "tone")
    pushing = asyncio.create_task(client.post("/v1/adapters", **upload(make_adapter())))
    assert await settled(lambda: parts_of(client).fleet.first.leases == 1)
    told = await client.post("/v1/engines/base/swap", json={"model": str(export)})
    assert told.status_code == 200, told.text
    go.set()
    pushed = (await pushing).json()
    assert pushed["checks"]["base_model"] == str(export)
    assert pushed["id"] in backend.heirs[0].probes


async def test_a_rollback_whose_version_cannot_be_loaded_is_done_and_says_so(
    client, backend, make_adapter, monkeypatch
):
    ids = await push_two(client, make_adapter)
    await client.post("/v1/adapters/tone/promote", json={"version": 2})
    base = parts_of(client).fleet.first

    async def refuse(*_):
        raise EngineUnavailable("no")

    assert await settled(lambda: len(backend.held) == 1), ids
    monkeypatch.setattr(base, "ensure", refuse)
    assert (await client.post("/v1/adapters/tone/rollback")).status_code == 200


async def test_a_swap_waits_for_changes_that_have_begun_and_holds_those_that_come():
    locks, order = ChangeLocks(), []

    async def change(name, go):
        async with locks.change(name):
            await go.wait()
            order.append(name)

    async def everything():
        async with locks.everything():
            order.append("everything")

    first, second = asyncio.Event(), asyncio.Event()
    second.set()
    jobs = []
    for job in (change("a", first), everything(), change("b", second)):
        jobs.append(asyncio.create_task(job))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert order == []
    first.set()
    await asyncio.gather(*jobs)
    assert order == ["a", "everything", "b"]


async def test_changes_of_two_adapters_do_not_wait_for_one_another_and_of_one_they_do():
    locks, go, order = ChangeLocks(), asyncio.Event(), []

    async def change(name, number, wait):
        async with locks.change(name):
            if wait:
                await go.wait()
            order.append((name, number))

    jobs = [asyncio.create_task(change(*job)) for job in (("a", 1, True), ("a", 2, False), ("b", 1, False))]
    await asyncio.sleep(0.01)
    assert order == [("b", 1)]
    go.set()
    await asyncio.gather(*jobs)
    assert order == [("b", 1), ("a", 1), ("a", 2)]
