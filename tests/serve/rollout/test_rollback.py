"""A bad version is rolled back once, whoever finds out first, and never to a later version."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import msgspec
import pytest

from serve.rollout.alertmanager import Notification
from serve.rollout.policy import parse
from tests.support.app import canary, push_two, said, upload
from tests.support.backend import FakeBackend

STARTED = "2026-11-24T12:00:00.000Z"


def notification(version="v2", adapter="tone", status="firing", fingerprint="abc123", **labels):
    labels = {"alertname": "LoradockBad", "action": "rollback", "adapter": adapter, "version": version, **labels}
    alert = {
        "status": status,
        "labels": {name: value for name, value in labels.items() if value is not None},
        "annotations": {"summary": "31 % of the answers are errors", "runbook_url": "x"},
        "startsAt": STARTED,
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph",
        "fingerprint": fingerprint,
    }
    return {"version": "4", "groupKey": "{}", "status": status, "receiver": "loradock", "alerts": [alert]}


async def alert(client, **fields):
    told = await client.post("/v1/alerts", json=notification(**fields))
    assert told.status_code == 200, told.text
    (row,) = told.json()["data"]
    return row["outcome"]


async def live(client, name="tone"):
    return (await client.get(f"/v1/adapters/{name}")).json()["live"]


@pytest.fixture
def bad(client, make_adapter):
    """Version 2 is live, version 1 was before it."""

    async def promote():
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})

    return promote


async def test_a_rollback_by_the_server_is_a_change_of_the_live_version_and_an_ended_canary_is_none(
    client, bad, make_adapter
):
    await bad()
    parts = client._transport.app.state.parts
    await client.post("/v1/adapters", **upload(make_adapter(7), "calm"))
    await client.post("/v1/adapters", **upload(make_adapter(8), "calm", promote="false"))
    await client.post("/v1/adapters/calm/canary", json={"version": 2, "weight": 0.5})
    assert await alert(client) == "rolled_back"
    assert await alert(client, adapter="calm", fingerprint="abc124") == "canary_ended"
    text = parts.metrics.render()[0].decode()
    assert 'loradock_adapter_swaps_total{adapter="tone",result="rolled_back"} 1.0' in text
    assert 'loradock_adapter_swaps_total{adapter="calm",result="rolled_back"} 0.0' in text
    for adapter in ("tone", "calm"):
        assert f'loradock_adapter_rollbacks_total{{adapter="{adapter}"}} 1.0' in text
        assert f'loradock_rollbacks_total{{adapter="{adapter}",reason="alert",version="v2"}} 1.0' in text


async def test_a_firing_alert_rolls_its_version_back_with_the_evidence_in_history_audit_and_metric(client, bad, config):
    await bad()
    assert await alert(client) == "rolled_back"
    assert await live(client) == 1
    last = (await client.get("/v1/adapters/tone")).json()["history"][-1]
    assert (last["who"], last["what"], last["from_version"], last["to_version"]) == ("wayback", "rollback", 2, 1)
    assert "LoradockBad" in last["why"] and "31 % of the answers" in last["why"]
    await asyncio.to_thread(client._transport.app.state.parts.events.settle)
    lines = [json.loads(line) for line in (config.data_dir / "audit.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["who"] == "wayback"]
    assert (line["what"], line["subject"], line["reason"], line["status"]) == ("rolled_back", "tone@v2", "alert", 200)
    assert "31 % of the answers" in line["evidence"]
    assert [line["subject"] for line in lines if line["what"] == "alerts"] == ["LoradockBad: rolled_back"]
    metrics = (await client.get("/metrics")).text
    assert 'loradock_rollbacks_total{adapter="tone",reason="alert",version="v2"} 1.0' in metrics


async def test_an_alert_that_was_acted_on_is_not_acted_on_again_not_even_by_the_next_process(
    connect, config, make_adapter
):
    async with connect(config) as client:
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert await alert(client) == "rolled_back"
        assert await alert(client) == "repeated"
    async with connect(config, FakeBackend(config.model)) as client:
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert await alert(client) == "repeated"
        assert await alert(client, fingerprint="def456") == "too_soon"
        assert await live(client) == 2


async def test_an_adapter_is_rolled_back_once_an_hour_whoever_asks(client, bad, rollback):
    await bad()
    evidence = {"log_evidence": 5.1}
    both = [rollback.rollback("tone", 2, "latency", evidence), rollback.rollback("tone", 2, "quality", evidence)]
    assert [verdict.outcome for verdict in await asyncio.gather(*both)] == ["rolled_back", "not_serving"]
    await client.post("/v1/adapters/tone/promote", json={"version": 2})
    assert await alert(client) == "too_soon"
    assert await live(client) == 2
    rollback._clock = lambda: time.time() + 3601
    assert await alert(client) == "rolled_back"


async def test_a_canary_ends_without_waiting_and_the_live_version_stays(client, make_adapter, rollback):
    await push_two(client, make_adapter)
    for fingerprint in ("aa", "bb"):  # started again by somebody, bad again
        await canary(client, 1.0)
        assert await alert(client, fingerprint=fingerprint) == "canary_ended"
        assert await live(client) == 1
        assert (await said(client)).startswith("tone@")
        assert (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def test_nothing_happens_to_a_version_that_has_no_traffic(client, bad):
    await bad()
    assert await alert(client, version="v1") == "not_serving"
    assert await alert(client, version="v7") == "not_serving"
    assert await live(client) == 2


async def test_the_way_back_never_leads_forward(client, bad):
    """Somebody has gone back to 1 by hand, and 1 is bad too: 2 is no place to go."""
    await bad()
    await client.post("/v1/adapters/tone/promote", json={"version": 1})
    assert await alert(client, version="v1") == "nowhere"
    assert await live(client) == 1


async def test_a_first_version_has_no_way_back(client, make_adapter):
    await push_two(client, make_adapter)
    assert await alert(client, version="v1") == "nowhere"


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "resolved"},
        {"action": None},
        {"action": "page"},
        {"version": "latest"},
        {"version": None},
        {"adapter": "another"},
        {"adapter": ""},
    ],
)
async def test_any_other_alert_is_left_to_people(client, bad, fields):
    await bad()
    assert await alert(client, **fields) == "ignored"
    assert await live(client) == 2


async def test_a_policy_that_leaves_it_to_people_holds_for_alerts_too(connect, config, make_adapter):
    policies = parse({"tone": {"worse": "notify"}})
    async with connect(replace(config, policies=policies)) as client:
        await push_two(client, make_adapter)
        await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert await alert(client) == "ignored"
        assert await live(client) == 2


async def test_a_key_rolls_back_what_it_manages_and_cannot_tell_the_rest_from_nothing(operator, issue, make_adapter):
    acme, rival = await issue("acme", name="acme"), await issue("rival", name="rival")
    asker = await issue("acme", "inference", name="asker")
    for seed in (0, 1):
        await acme.post("/v1/adapters", **upload(make_adapter(seed)))
    there = (await rival.post("/v1/alerts", json=notification(adapter="acme/tone"))).json()
    nothing = (await rival.post("/v1/alerts", json=notification(adapter="acme/none"))).json()
    assert there == nothing
    assert (await asker.post("/v1/alerts", json=notification(adapter="acme/tone"))).status_code == 403
    del asker.headers["authorization"]
    assert (await asker.post("/v1/alerts", json=notification(adapter="acme/tone"))).status_code == 401
    assert await live(acme) == 2
    assert await alert(acme, adapter="acme/tone") == "rolled_back"
    assert await live(acme) == 1


async def test_what_is_no_notification_is_refused_in_a_sentence(client):
    for body, where in (({}, "alerts"), ({"alerts": [{"status": "firing"}]}, "alerts.0.labels")):
        told = await client.post("/v1/alerts", json=body)
        assert told.status_code == 400
        assert told.json()["error"]["message"] == f"{where}: Field required"


def test_alertmanagers_own_fields_are_all_taken():
    assert msgspec.convert(notification(), Notification).alerts[0].key == f"abc123@{STARTED}"


@pytest.fixture
def rollback(client):
    return client._transport.app.state.parts.automatic_rollback
