"""What a golden set's scores lead to: canaries taken back or proved, pushes without traffic."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from serve.errors import EngineUnavailable
from serve.events import CanaryVerdict
from serve.rollout.golden import golden_schedule
from serve.rollout.golden.golden_store import GoldenStore
from serve.rollout.policy import DEFAULT_POLICIES
from serve.sequential.sequential_test import Verdict
from tests.support.app import push_two, upload
from tests.support.golden import Skill, cases, put, ran, results
from tests.support.waiting import settled


async def test_a_canary_that_is_worse_by_ten_points_is_taken_back_with_the_number_of_cases(
    client, backend, make_adapter
):
    skill = Skill(backend, usual=0.95)
    _, canary = await push_two(client, make_adapter)
    skill.of[canary] = 0.85
    await put(client, cases(400))
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.2})
    client._transport.app.state.parts.golden.runs.wake()

    async def ended():
        return (await client.get("/v1/adapters/tone")).json()["canary"] is None

    assert await settled(ended), (await results(client))["canary"]
    entry = (await client.get("/v1/adapters/tone")).json()["history"][-1]
    assert (entry["who"], entry["what"]) == ("wayback", "canary_end") and entry["why"].startswith("golden: ")
    evidence = json.loads(entry["why"].partition(": ")[2])["golden"]
    assert evidence["cases"] <= 400 and 0.05 < evidence["worse_by"] < 0.2
    assert evidence["log_evidence"] >= evidence["log_threshold"]

    async def counted():
        return (
            'loradock_rollbacks_total{adapter="tone",reason="golden",version="v2"} 1.0'
            in (await client.get("/metrics")).text
        )

    assert await settled(counted)


async def test_a_verdict_that_could_not_be_noted_at_first_is_acted_on_later(client, backend, make_adapter, monkeypatch):
    skill = Skill(backend)
    _, canary = await push_two(client, make_adapter)
    skill.of[canary] = 0.0
    announce, failures = GoldenStore.announce, []

    def fail_once(store, name, verdict):
        if not failures:
            failures.append(verdict)
            raise EngineUnavailable("the registry did not take the change")
        announce(store, name, verdict)

    monkeypatch.setattr(GoldenStore, "announce", fail_once)
    monkeypatch.setattr(golden_schedule, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(golden_schedule, "LOOK_SECONDS", 0.1)
    await put(client, cases(80))
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.2})
    client._transport.app.state.parts.golden.runs.wake()

    async def ended():
        return (await client.get("/v1/adapters/tone")).json()["canary"] is None

    assert await settled(ended)
    assert failures == ["1:2"]


async def test_a_canary_that_answers_as_well_stays_and_proves_itself(client, backend, make_adapter):
    Skill(backend, usual=0.9)
    await push_two(client, make_adapter)
    await put(client, cases(100))
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.2})
    await ran(client, 1)
    await ran(client, 2)
    stands = (await settled(lambda: proved(client)))["canary"]
    assert (stands["verdict"], stands["cases"], stands["worse_by"], stands["agrees"]) == ("proved", 100, 0.0, True)
    assert "too few to decide a difference of 10 points" in stands["note"]
    assert (await client.get("/v1/adapters/tone/drift")).json()["golden"] == stands
    assert (await client.get("/v1/adapters/tone")).json()["canary"], "it is as good: nothing is done about it"


async def proved(client):
    answer = await results(client)
    return answer if (answer["canary"] or {}).get("verdict") == "proved" else None


async def test_proved_by_traffic_waits_until_the_golden_set_agrees(client, backend, make_adapter, monkeypatch):
    Skill(backend)
    await push_two(client, make_adapter)
    parts = client._transport.app.state.parts
    acted = []
    monkeypatch.setattr(parts.rollout_controller, "act_on", acted.append)
    verdict = CanaryVerdict("tone", 1, 2, Verdict.PROVED, "proved", {})
    assert await parts.golden.verdicts.admitted(verdict) is verdict, "without a set nothing waits"
    backend.flow.clear()
    stream = asyncio.create_task(client.post("/v1/chat/completions", json={"model": "tone", "stream": True}))
    assert await settled(lambda: asyncio.sleep(0, backend.running == 1))
    await put(client, cases(80))
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.2})
    assert await parts.golden.verdicts.admitted(verdict) is None
    assert not acted
    backend.flow.set()
    await stream
    parts.golden.runs.wake()
    assert await settled(lambda: asyncio.sleep(0, acted == [verdict]))


async def test_a_push_below_the_policys_score_gets_no_traffic_and_one_above_it_does(
    connect, config, backend, make_adapter
):
    skill = Skill(backend)
    policy = replace(DEFAULT_POLICIES[0], golden_min=0.8)
    async with connect(replace(config, policies=(policy,))) as client:
        await client.post("/v1/adapters", **upload(make_adapter(0)))
        await put(client, cases(10))
        await ran(client, 1)
        skill.usual = 0.05
        pushed = (await client.post("/v1/adapters", **upload(make_adapter(1)))).json()
        assert not pushed["live"]
        assert (await ran(client, 2))[0]["score"] == 0.5
        assert await settled(lambda: noted(client))
        entry = (await client.get("/v1/adapters/tone")).json()["history"][-1]
        assert entry["what"] == "golden_hold" and "0.500 on 10 cases" in entry["why"]
        held = await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert held.status_code == 409 and "scores 0.500 on 10 cases" in held.json()["error"]["message"]
        skill.usual = 1.0
        assert not (await client.post("/v1/adapters", **upload(make_adapter(2)))).json()["live"]
        await ran(client, 3)

        async def live():
            return (await client.get("/v1/adapters/tone")).json()["live"] == 3

        assert await settled(live)
        entry = (await client.get("/v1/adapters/tone")).json()["history"][-1]
        assert (entry["what"], entry["who"]) == ("promote", "anonymous") and "golden score 1.000" in entry["why"]
        insisted = await client.post("/v1/adapters/tone/promote", json={"version": 2, "at_once": True})
        assert insisted.status_code == 200 and insisted.json()["live"]


async def noted(client):
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    return history[-1]["what"] == "golden_hold"
