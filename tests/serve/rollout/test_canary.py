"""A canary is compared with the live version, and ended or promoted by policy."""

from __future__ import annotations

import json
from dataclasses import replace

from serve.rollout.policy import DEFAULT_POLICIES
from tests.support.app import upload
from tests.support.watched_traffic import CHAT, Engine, ask, askers, canary_ended, drift, push, until


async def test_a_canary_that_is_slower_is_ended_with_the_evidence_in_history_audit_and_metrics(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.slow[canary] = 1.25
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.25})
        for _ in range(20):
            await ask(client, 50)
            await drift(client)
            if await canary_ended(client):
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] is None and shown["live"] == 1
        entry = shown["history"][-1]
        assert entry["who"] == "wayback" and "inter_token" in entry["why"]
        counted = 'loradock_rollbacks_total{adapter="tone",reason="latency",version="v2"} 1.0'

        async def told():
            return counted in (await client.get("/metrics")).text

        assert await until(told)
        log = watched.data_dir / "audit.jsonl"

        async def audited():
            last = json.loads(log.read_text().splitlines()[-1])
            return last["what"] == "canary_ended" and "inter_token" in last["evidence"]

        assert await until(audited)


async def test_a_damaged_canary_is_ended_within_sixty_of_its_requests(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.1})
        for _ in range(100):
            await ask(client, 20)
            await drift(client)
            if await canary_ended(client):
                break
        used = sum(body["model"] == canary for body in backend.bodies)
        assert used <= 60 and (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def test_by_policy_a_promote_begins_as_a_canary_and_ends_when_it_has_proved_itself(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], canary_weight=0.5, proved="promote", alpha=0.05)
    async with connect(replace(watched, policies=(policy,))) as client:
        await client.post("/v1/adapters", **upload(make_adapter(0)))
        await client.post("/v1/adapters", **upload(make_adapter(1)))
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (1, {"version": 2, "weight": 0.5})
        for _ in range(40):
            await ask(client, 50)
            await drift(client)
            if (await client.get("/v1/adapters/tone")).json()["live"] == 2:
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (2, None)
        assert shown["history"][-1]["who"] == "referee" or shown["history"][-2]["who"] == "referee"


async def test_by_policy_a_canary_that_did_worse_is_held_back_until_somebody_insists(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], worse="hold")
    async with connect(replace(watched, policies=(policy,))) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        await ask(client, 200)
        assert (await drift(client))["canary"]["verdict"] == "worse"
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] == {"version": 2, "weight": 0.5}, "to hold is not to end"
        held = await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert held.status_code == 409 and "did worse" in held.json()["error"]["message"]
        insisted = await client.post("/v1/adapters/tone/promote", json={"version": 2, "at_once": True})
        assert insisted.status_code == 200 and insisted.json()["live"]


async def test_bad_ratings_alone_end_a_canary(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        for _ in range(300):
            answer = await client.post(CHAT, json={"model": "tone", "user": f"u{next(askers)}"})
            rating = 0.1 if answer.json()["model"] == canary else 0.9
            body = {"request_id": answer.headers["x-request-id"], "rating": rating}
            assert (await client.post("/v1/feedback", json=body)).status_code == 200
        await drift(client)
        assert await until(lambda: canary_ended(client))
        assert "rating" in (await client.get("/v1/adapters/tone")).json()["history"][-1]["why"]
