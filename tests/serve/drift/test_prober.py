"""Live versions are asked the same prompts again and again: weights that changed are an alarm, rounding is none."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from serve.drift import prober as prober_module
from serve.errors import NotFound
from tests.support.app import upload
from tests.support.waiting import settled
from tests.support.watched_traffic import CHAT, Engine, drift, push


def busy(backend):
    """While others are answered an adapter's answers are off by 0.1 nats in the mean, in either direction."""
    draw = random.Random(0)
    probe = backend.probe

    async def rounded(adapter_id, prompts):
        moved = draw.uniform(-0.2, 0.2) if backend.running and adapter_id else 0.0
        return [{token: value + moved for token, value in row.items()} for row in await probe(adapter_id, prompts)]

    backend.probe = rounded


async def test_a_restart_under_load_raises_no_alarm_about_unchanged_bytes(
    connect, watched, backend, make_adapter, monkeypatch
):
    monkeypatch.setattr(prober_module, "PAUSE_SECONDS", 0.0)
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await client._transport.app.state.parts.prober.round()
    busy(backend)
    backend.held.clear()
    backend.numbers.clear()
    async with connect(watched) as client:
        prober = client._transport.app.state.parts.prober
        backend.flow.clear()
        streams = [asyncio.create_task(client.post(CHAT, json={"model": "tone", "stream": True})) for _ in range(3)]
        assert await settled(lambda: backend.running == 3)
        await prober.round()
        assert (await drift(client))["versions"][0]["signals"]["prompt"]["alarms"] == 0
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []
        backend.flow.set()
        await asyncio.gather(*streams)
        await prober.round()
        probe = (await drift(client))["versions"][0]["probe"]
        assert probe["noise_ratio"] == 0.0, "asked again once the engine was idle"
        lines = (await client.get("/metrics")).text.splitlines()
        alarms = [line for line in lines if line.startswith("loradock_drift_alarms_total{")]
        assert alarms and all(line.endswith(" 0.0") for line in alarms)


async def test_what_an_engine_rounds_that_is_never_idle_raises_no_alarm_and_what_changed_does(
    connect, watched, backend, make_adapter, monkeypatch
):
    monkeypatch.setattr(prober_module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(prober_module, "CONFIRM_SECONDS", 0.0)
    Engine(backend)
    async with connect(watched) as client:
        prober = client._transport.app.state.parts.prober
        await push(client, make_adapter, 0)
        await prober.round()
        busy(backend)
        backend.flow.clear()
        stream = asyncio.create_task(client.post(CHAT, json={"model": "tone", "stream": True}))
        assert await settled(lambda: backend.running == 1)
        prober._interval = 1e-9
        for _ in range(4):
            await prober.round()
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []
        backend.effects["tone"] = 1.5
        for _ in range(2):
            await prober.round()
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == ["probe"]
        backend.flow.set()
        await stream


async def test_first_answers_of_a_busy_engine_raise_no_alarm_once_it_is_idle(
    connect, watched, backend, make_adapter, monkeypatch
):
    monkeypatch.setattr(prober_module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(prober_module, "CONFIRM_SECONDS", 0.0)
    Engine(backend)
    async with connect(watched) as client:
        prober = client._transport.app.state.parts.prober
        await push(client, make_adapter, 0)
        busy(backend)
        backend.flow.clear()
        stream = asyncio.create_task(client.post(CHAT, json={"model": "tone", "stream": True}))
        assert await settled(lambda: backend.running == 1)
        prober._interval = 1e-9
        for _ in range(2):
            await prober.round()
        backend.flow.set()
        await stream
        for _ in range(2):
            await prober.round()
        assert (await drift(client))["versions"][0]["probe"]["noise_ratio"] > 0, "the first answers were kept"
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []


async def test_other_kernels_after_a_restart_raise_no_alarm_about_unchanged_bytes(
    connect, watched, backend, make_adapter
):
    """As measured: without our kernels the base moves by 0.053 nats and a strong adapter by 0.092."""
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        await client._transport.app.state.parts.prober.round()
    probe, moved = backend.probe, {None: 0.053}

    async def other_kernels(adapter_id, prompts):
        by = moved.get(adapter_id, 0.092)
        return [{token: value + by for token, value in row.items()} for row in await probe(adapter_id, prompts)]

    backend.probe = other_kernels
    backend.held.clear()
    backend.numbers.clear()
    async with connect(watched) as client:
        prober = client._transport.app.state.parts.prober
        await prober.round()
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == []
        backend.effects["tone"] = 1.5
        prober._interval = 1e-9
        await prober.round()
        assert (await client.get("/v1/drift")).json()["data"][0]["versions"][0]["drifted"] == ["probe"]


async def test_an_adapter_whose_base_is_not_served_here_keeps_no_other_from_being_probed(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    async with connect(watched) as client:
        parts = client._transport.app.state.parts
        await client.post("/v1/adapters", **upload(make_adapter(1), name="another"))
        await push(client, make_adapter, 0)
        parts.fleet._base_of = lambda name: "gone" if name == "another" else None
        await parts.prober.round()
        (row,) = (await client.get("/v1/drift")).json()["data"]
        assert row["name"] == "tone"


async def test_an_adapter_whose_files_are_lost_keeps_no_other_from_being_probed(
    connect, watched, backend, make_adapter, monkeypatch
):
    Engine(backend)
    async with connect(watched) as client:
        parts = client._transport.app.state.parts
        lost = (await client.post("/v1/adapters", **upload(make_adapter(1), name="another"))).json()
        await push(client, make_adapter, 0)
        bring = parts.store.bring

        async def brought(digest):
            if lost["id"].partition("@")[2] in digest:
                raise NotFound("the files of this version are lost")
            return await bring(digest)

        monkeypatch.setattr(parts.store, "bring", brought)
        await parts.prober.round()
        (row,) = (await client.get("/v1/drift")).json()["data"]
        assert row["name"] == "tone"


async def test_a_version_that_comes_and_goes_is_asked_as_often_as_one_that_stays(
    connect, watched, backend, make_adapter, monkeypatch
):
    """Each time that it was loaded it was asked 32 prompts and more: with 64 adapters on eight slots engines did hardly
    anything else in the gaps of traffic."""
    monkeypatch.setattr(prober_module, "PAUSE_SECONDS", 0.0)
    Engine(backend)
    async with connect(watched) as client:
        parts = client._transport.app.state.parts
        await push(client, make_adapter, 0)
        await parts.prober.round()
        asked, probe = [], backend.probe

        async def counted(adapter_id, prompts):
            asked.append(adapter_id)
            return await probe(adapter_id, prompts)

        backend.probe = counted
        engine, (resident,) = parts.fleet.owner("tone").engine, parts.fleet.owner("tone").residents
        for _ in range(3):
            engine.retire(resident.id)
            await engine.gone(resident.id)
            assert not any(each.loaded for each in engine.residents)
            await parts.prober.round()
            assert (await client.post(CHAT, json={"model": "tone"})).status_code == 200
            assert any(each.loaded for each in engine.residents)
            await parts.prober.round()
        assert not asked
        parts.prober._interval = 1e-9
        await parts.prober.round()
        assert len(asked) == len(prober_module.FIXED)


@pytest.mark.parametrize("drift", [True, False])
async def test_without_drift_nothing_is_probed(connect, watched, drift):
    """It was: with `--no-drift` each version that was loaded was asked all the same."""
    async with connect(replace(watched, drift=drift)) as client:
        assert ('task="prober"' in (await client.get("/metrics")).text) is drift
