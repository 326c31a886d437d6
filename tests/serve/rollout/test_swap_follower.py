"""A base that was swapped on another server is swapped here, sooner or later, and requests and heartbeats go on."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from serve.errors import Conflict
from serve.rollout import swap_follower
from serve.rollout.swap_follower import SwapFollower
from tests.support.app import ask, upload
from tests.support.waiting import settled


@pytest.fixture
async def sharing(connect, config, tmp_path):
    """A client of a server whose registry others have too."""
    both = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")
    async with connect(both) as client:
        yield client


@pytest.fixture
def elsewhere(sharing, tiny_model, tmp_path):
    """Another server's swap, as the registry has it; gives the model."""
    export = shutil.copytree(tiny_model, tmp_path / "export")

    def swapped():
        base = parts_of(sharing).fleet.first
        parts_of(sharing).registry.swap(base.name, base.configured, str(export), by="other")
        return str(export)

    return swapped


def parts_of(client):
    return client._transport.app.state.parts


async def test_a_swap_that_drained_first_is_followed_where_two_engines_have_no_room(sharing, backend, elsewhere):
    backend.prepare = lambda heir: setattr(heir, "no_room", True)
    model = elsewhere()
    base = parts_of(sharing).fleet.first
    assert await settled(lambda: base.model == model and base.is_ready)
    assert backend.stops == 1
    assert (await ask(sharing, "base")).status_code == 200


async def test_what_another_server_has_measured_is_not_measured_again(sharing, backend, elsewhere, make_adapter):
    ids = [
        (await sharing.post("/v1/adapters", **upload(make_adapter(seed), f"a{seed}"))).json()["id"] for seed in (0, 1)
    ]
    backend.probes.clear()
    model = elsewhere()
    base = parts_of(sharing).fleet.first
    assert await settled(lambda: base.model == model and base.is_ready)
    assert set(base.backend.held) == set(ids)
    assert not set(backend.probes) and set(base.backend.probes) <= {None}, "its base alone is looked at"


async def test_a_model_that_did_not_start_here_is_tried_again(sharing, backend, elsewhere, monkeypatch):
    monkeypatch.setattr(swap_follower, "RETRY_SECONDS", 0.1)
    fails = [True]
    backend.prepare = lambda heir: setattr(heir, "wont_start", "no" if fails[0] and "export" in heir.model else None)
    model = elsewhere()
    base = parts_of(sharing).fleet.first
    assert await settled(lambda: "base_swap" in parts_of(sharing).health.degraded)
    assert (await ask(sharing, "base")).status_code == 200
    fails[0] = False
    assert await settled(lambda: base.model == model and base.is_ready)
    assert await settled(lambda: not parts_of(sharing).health.degraded)


async def test_the_wait_between_two_tries_doubles(client, monkeypatch):
    parts, now, tries = parts_of(client), [0.0], []
    base = parts.fleet.first
    parts.registry.swap(base.name, base.configured, "another", by="other")
    follower = SwapFollower(parts.registry, parts.fleet, lambda: now[0])

    async def swap(base, model):
        tries.append(now[0])
        raise Conflict("no")

    monkeypatch.setattr(follower, "_swap", swap)
    for moment in (0, 59, 61, 180, 182, 421, 423):
        now[0] = moment
        await follower.follow(base)
    assert tries == [0, 61, 182, 423]
    parts.registry.swap(base.name, base.configured, "a third", by="other")
    await follower.follow(base)
    assert tries[-1:] == [423] and len(tries) == 5, "another model is another matter"


async def test_a_swap_that_is_followed_does_not_hold_the_heartbeat_up(sharing, backend, elsewhere, monkeypatch):
    monkeypatch.setattr("serve.fleet.heartbeat.BEAT_SECONDS", 0.05)
    go = asyncio.Event()
    backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    elsewhere()
    assert await settled(lambda: parts_of(sharing).fleet.first.swapping)
    beats, heartbeat = [], parts_of(sharing).heartbeat
    exchange = heartbeat._exchange
    monkeypatch.setattr(heartbeat, "_exchange", lambda *row: (beats.append(1), exchange(*row))[1])
    assert await settled(lambda: len(beats) > 2)
    go.set()
