"""Servers of one registry go over to a new base model together, and none waits for one that cannot."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sqlalchemy import insert

from serve.adapters.registry.tables import swap_announcements
from serve.engine import base_swap
from serve.engine.base_swap import Approval
from serve.rollout import swap_follower, swap_together
from tests.support.app import ask
from tests.support.backend import FakeBackend
from tests.support.waiting import settled


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("serve.fleet.heartbeat.BEAT_SECONDS", 0.02)
    # However slow the machine is, nobody is gone by chance.
    monkeypatch.setattr("serve.fleet.heartbeat.MISSED", 1_000_000)
    monkeypatch.setattr(swap_follower, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(swap_together, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(swap_together, "OVER_SECONDS", 1_000_000)
    monkeypatch.setattr(swap_together, "NOTICED_SECONDS", 60.0)


@pytest.fixture
async def pair(connect, config, tiny_model, tmp_path):
    """Two servers of one registry, and the model that is to come."""
    both = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")
    async with AsyncExitStack() as stack:
        servers = []
        for number in range(2):
            backend = FakeBackend(str(tiny_model))
            own = replace(both, data_dir=tmp_path / f"data-{number}")
            client = await stack.enter_async_context(connect(own, backend))
            parts = client._transport.app.state.parts
            servers.append(
                SimpleNamespace(
                    client=client, backend=backend, parts=parts, base=parts.fleet.first, me=parts.heartbeat.me.id
                )
            )
        assert await settled(lambda: all(len(server.parts.heartbeat.living()) == 2 for server in servers))
        export = str(shutil.copytree(tiny_model, tmp_path / "export"))
        yield *servers, str(tiny_model), export


def models(*servers):
    return [server.base.model for server in servers]


def swapped(server, model):
    """A swap that this server was asked for."""
    return asyncio.create_task(server.client.post("/v1/engines/base/swap", json={"model": model}, timeout=60))


async def test_nobody_answers_with_the_new_model_before_all_could(pair, monkeypatch):
    monkeypatch.setattr(swap_together, "NOTICED_SECONDS", 1e6)
    one, other, old, new = pair
    go = asyncio.Event()
    other.backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    swap = swapped(one, new)
    assert await settled(lambda: other.base.swapping and one.base.swapping)
    assert await settled(lambda: one.base.swapping["step"] == "waiting for other servers")
    for _ in range(20):
        await asyncio.sleep(0.02)
        assert models(one, other) == [old, old] and not swap.done()
    go.set()
    assert (await swap).status_code == 200
    assert models(one, other) == [new, new]
    assert await asyncio.to_thread(one.parts.swap_follower._rows.announced, "base") is None
    assert (await ask(other.client, "base")).status_code == 200
    # And back: the one that followed is asked.
    assert await settled(lambda: not other.base.swapping)
    other.backend.prepare = lambda heir: None
    assert (await swapped(other, old)).status_code == 200
    assert models(one, other) == [old, old]


async def test_who_is_told_that_a_swap_is_done_meets_the_old_model_nowhere(pair):
    one, other, _, new = pair
    looked = other.parts.registry.swapped

    def later(*base):
        """The other one sees what the registry names some time after it does."""
        model = looked(*base)
        time.sleep(0.3)
        return model

    other.parts.registry.swapped = later
    assert (await swapped(one, new)).status_code == 200
    assert models(one, other) == [new, new]


async def test_a_swap_that_is_given_up_is_given_up_by_all(pair):
    one, other, old, new = pair
    go = asyncio.Event()
    other.backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    pace = one.parts.swap_follower.leading()
    swap = base_swap.swap(one.base, new, by="me", approval=Approval.FORCED, pace=pace)
    swapping = asyncio.create_task(swap)
    assert await settled(lambda: other.base.swapping and one.base.swapping["step"].startswith("waiting"))
    swapping.cancel()
    await asyncio.gather(swapping, return_exceptions=True)
    go.set()
    assert await settled(lambda: not other.base.swapping and not one.base.swapping)
    assert models(one, other) == [old, old]
    assert (await ask(other.client, "base")).status_code == 200


async def test_a_server_without_room_for_both_engines_goes_over_afterwards(pair, monkeypatch):
    monkeypatch.setattr(swap_together, "NOTICED_SECONDS", 1e6)
    one, other, _, new = pair
    other.backend.prepare = lambda heir: setattr(heir, "no_room", True)
    assert (await swapped(one, new)).status_code == 200
    assert one.base.model == new
    assert await settled(lambda: other.base.model == new and other.base.is_ready)
    assert other.backend.stops == 1


async def test_what_a_server_announced_that_is_gone_is_not_prepared(pair):
    one, other, old, new = pair

    def announce():
        with one.parts.registry.adding() as connection:
            row = {"base": "base", "model": new, "server": "ghost", "when": 1.0}
            connection.execute(insert(swap_announcements).values(row))

    await asyncio.to_thread(announce)
    looks, announced = [], other.parts.swap_follower._rows.announced
    other.parts.swap_follower._rows.announced = lambda base: (looks.append(base), announced(base))[1]
    assert await settled(lambda: len(looks) > 3)
    assert not one.backend.heirs and not other.backend.heirs and models(one, other) == [old, old]


async def test_a_server_alone_waits_for_nobody(client, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(swap_together, "NOTICED_SECONDS", 1e6)
    export = str(shutil.copytree(tiny_model, tmp_path / "export"))
    answer = await client.post("/v1/engines/base/swap", json={"model": export})
    assert answer.status_code == 200, answer.text
