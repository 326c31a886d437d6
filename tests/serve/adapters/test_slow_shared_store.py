"""A shared folder that is slow delays those who need its bytes, and nobody else."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace

import pytest

from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled


@pytest.fixture
def both(config, tmp_path):
    return replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")


@pytest.fixture
async def lacking(connect, both, make_adapter, backend):
    """A client of a server that lacks the bytes of its adapter `tone`, and the adapter's id."""
    async with connect(both) as client:
        told = (await client.post("/v1/adapters", **upload(make_adapter()))).json()
        parts, engine = parts_of(client), parts_of(client).fleet.first.engine
        engine.retire(told["id"])
        assert await settled(lambda: not backend.held)
        shutil.rmtree(parts.store.path(told["digest"]))
        yield client, told["id"]


@pytest.fixture
def slow(monkeypatch):
    """Makes a client's server wait for the shared folder until the event is set; and the calls that were made."""
    go, calls = threading.Event(), []

    def make_slow(client, what):
        shared = parts_of(client).store.shared
        call = getattr(shared, what)
        monkeypatch.setattr(shared, what, lambda *args: (calls.append(what), go.wait(60), call(*args))[-1])
        return go, calls

    yield make_slow
    go.set()


def parts_of(client):
    return client._transport.app.state.parts


async def test_a_crowd_that_asks_for_an_adapter_on_its_way_is_one_download_and_holds_nobody_up(lacking, slow):
    client, adapter_id = lacking
    go, calls = slow(client, "get")
    asking = [asyncio.create_task(ask(client, "tone")) for _ in range(40)]
    assert await settled(lambda: calls)
    for path in ("/metrics", "/v1/adapters/tone", "/ready"):
        assert (await asyncio.wait_for(client.get(path), 30)).status_code == 200
    assert (await asyncio.wait_for(ask(client, "base"), 30)).status_code == 200
    assert not any(task.done() for task in asking)
    go.set()
    assert {(await task).json()["model"] for task in asking} == {adapter_id}
    assert len(calls) == 1


async def test_bytes_that_do_not_come_in_time_are_a_503_and_come_all_the_same(lacking, slow, monkeypatch):
    client, _ = lacking
    monkeypatch.setattr("serve.adapters.store.DOWNLOAD_SECONDS", 0.1)
    go, calls = slow(client, "get")
    told = await asyncio.wait_for(ask(client, "tone"), 30)
    assert told.status_code == 503 and int(told.headers["retry-after"]) >= 1
    go.set()
    assert await settled(lambda: parts_of(client).store.has(*parts_of(client).registry.digests()))
    assert (await ask(client, "tone")).status_code == 200 and len(calls) == 1


async def test_a_download_that_failed_is_begun_anew(lacking, monkeypatch):
    client, adapter_id = lacking
    with monkeypatch.context() as patch:
        patch.setattr(parts_of(client).store.shared._system, "get_file", lambda *_: 1 / 0)
        assert (await ask(client, "tone")).status_code == 503
    assert (await ask(client, "tone")).json() == {"model": adapter_id}


async def test_a_push_that_the_shared_folder_does_not_take_is_a_503_and_leaves_nothing(
    connect, both, make_adapter, slow, monkeypatch
):
    monkeypatch.setattr("serve.adapters.store.UPLOAD_SECONDS", 0.1)
    async with connect(both) as client:
        go, _ = slow(client, "put")
        told = await asyncio.wait_for(client.post("/v1/adapters", **upload(make_adapter())), 30)
        assert told.status_code == 503
        assert (await client.get("/v1/adapters")).json()["data"] == []
        monkeypatch.setattr("serve.adapters.store.UPLOAD_SECONDS", 60.0)
        go.set()
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201


async def test_a_start_does_not_wait_for_the_shared_folders_sweep(connect, both, slow, monkeypatch):
    monkeypatch.setattr("serve.rollout.lifecycle.SWEEP_SECONDS", 0.1)
    monkeypatch.setattr("serve.rollout.lifecycle.SETTLE_SECONDS", 0.1)
    go = threading.Event()
    monkeypatch.setattr("serve.adapters.shared_store.SharedStore.sweep", lambda *_: go.wait(60))
    async with connect(both, FakeBackend(both.model)) as client:
        assert (await client.get("/ready")).status_code == 200
    go.set()
