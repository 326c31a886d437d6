"""What the dashboard asks for: what has problems or traffic first, whatever there is else, and never all at once."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.change import KINDS
from serve.api.dashboard import pages
from serve.api.overview import CARDS, PAGE, VERSIONS
from serve.asgi.exchange import Exchange
from tests.support.app import ask, push_two, upload
from tests.support.waiting import settled

FOUND = Inspection(rank=8, base="toy", target_modules=("q_proj",), nbytes=1234, tensors=4)


async def registered(client, count, name="adapter-{:04}", versions=1):
    """Adapters that nobody asked yet, straight into the registry."""
    registry = client._transport.app.state.parts.registry

    def add():
        for number in range(count):
            for version in range(versions):
                registry.add(name.format(number), FOUND, f"{number:032x}{version:032x}", by="ada")

    await asyncio.to_thread(add)


async def seen(client, path="/v1/overview", **params):
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_problems_come_first_then_traffic_then_all_others_by_name(client, make_adapter, monkeypatch):
    for seed, name in enumerate(("calm", "busy", "worse", "quiet", "alarmed")):
        await client.post("/v1/adapters", **upload(make_adapter(seed), name=name))
    for name in ("calm", "busy", "busy", "worse"):
        await ask(client, name)
    parts = client._transport.app.state.parts
    row = {"version": "v1", "drifted": ["prompt"], "moved": {"prompt": "in another language"}}
    monkeypatch.setattr(parts.drift_monitor, "summary", lambda: {"alarmed": [row]})
    parts.recent.take(Exchange("worse", "v1", 503, None, 1.0))
    answer = await seen(client)
    assert [card["name"] for card in answer["first"]] == ["worse", "alarmed", "busy", "calm"]
    assert [row["name"] for row in answer["data"]] == ["quiet"] and answer["rest"] == 1
    worse, alarmed, busy, _ = answer["first"]
    assert worse["problems"] == [{"kind": "errors", "version": 1, "text": "1 of 2 requests failed"}]
    assert alarmed["problems"] == [{"kind": "drift", "version": 1, "text": "in another language"}]
    assert (busy["requests"], busy["versions"][0]["recent"]["all"]["requests"]) == (2, 2)
    assert (answer["adapters"], answer["with_problems"], answer["with_traffic"]) == (5, 2, 3)


async def test_how_much_is_asked_now_is_said_to_a_tenant_of_its_own_alone(operator, issue, make_adapter):
    await operator.post("/v1/adapters", **upload(make_adapter(0), name="tone"))
    await ask(operator, "tone")
    async with await issue("acme") as acme:
        await acme.post("/v1/adapters", **upload(make_adapter(1), name="ours"))
        for _ in range(2):
            await ask(acme, "ours")
        mine, every = (await seen(acme)), (await seen(operator))
    assert (mine["now"]["requests"], every["now"]["requests"], every["now"]["errors"]) == (2, 3, 0)
    assert mine["now"]["tokens_per_second"] == pytest.approx(2 * mine["now"]["requests_per_second"], rel=0.1)
    assert mine["now"]["first_token_p95"] > 0
    assert "waiting" not in mine["engines"][0] and every["engines"][0]["waiting"] == 0
    assert mine["started"] <= time.time()


async def test_search_and_pages_are_of_all_adapters(client):
    await registered(client, 120)
    whole = await seen(client)
    assert (whole["adapters"], whole["rest"], len(whole["data"])) == (120, 120, 50)
    last = await seen(client, offset=100)
    assert [row["name"] for row in last["data"]] == [f"adapter-{number:04}" for number in range(100, 120)]
    few = await seen(client, search="R-001")
    assert (few["matching"], few["adapters"]) == (10, 120)
    assert (await seen(client, search="no such"))["data"] == []


async def test_a_thousand_adapters_with_a_hundred_versions_fit_into_a_hundred_kilobytes(client, make_adapter):
    await registered(client, 1000)
    await registered(client, 1, "old", versions=100)
    parts = client._transport.app.state.parts
    for number in range(300):
        parts.recent.take(Exchange(f"adapter-{number:04}", "v1", 200, 0.04, 1.0))
    for version in range(1, 101):
        parts.recent.take(Exchange("old", f"v{version}", 200, 0.04, 1.0))
    answer = await client.get("/v1/overview")
    assert len(answer.content) < 100_000
    first = answer.json()["first"]
    assert len(first) == CARDS
    assert max(len(card["versions"]) for card in first) == VERSIONS
    assert next(card for card in first if card["name"] == "old")["versions_total"] == 100


async def test_older_versions_come_a_page_at_a_time(client):
    await registered(client, 1, "tone", versions=50)
    card = await seen(client, "/v1/overview/adapters/tone")
    assert [version["version"] for version in card["versions"]] == [50, 49] and card["before"] == 49
    page = await seen(client, "/v1/overview/adapters/tone", before=49)
    assert [version["version"] for version in page["versions"]] == list(range(48, 48 - PAGE, -1))
    assert (await seen(client, "/v1/overview/adapters/tone", before=1))["versions"] == []


async def test_a_card_says_where_a_rollback_goes_and_what_is_dealt_out(connect, watched, make_adapter):
    async with connect(watched) as client:
        await dealt_out(client, make_adapter)


async def dealt_out(client, make_adapter):
    await push_two(client, make_adapter)
    card = await seen(client, "/v1/overview/adapters/tone")
    assert (card["live"], card["before"], card["canary"]) == (1, None, None)
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.25})
    for _ in range(4):
        await ask(client, "tone")
    card = await seen(client, "/v1/overview/adapters/tone")
    assert card["canary"] == {"version": 2, "weight": 0.25}
    parts = client._transport.app.state.parts
    assert await settled(lambda: parts.canary_monitor.report("tone") is not None)
    card = await seen(client, "/v1/overview/adapters/tone")
    assert card["canary_report"]["verdict"] == "undecided" and card["canary_report"]["log_threshold"] > 0
    await client.post("/v1/adapters/tone/promote", json={"version": 2})
    assert (await seen(client, "/v1/overview/adapters/tone"))["before"] == 1


async def test_a_version_comes_with_its_golden_score_and_cases_that_have_none_are_a_problem(
    client, backend, make_adapter
):
    backend.say = lambda body: "yes" if "prompt" in body else "who knows"  # the second is what the judge says
    await client.post("/v1/adapters", **upload(make_adapter(0)))
    cases = [{"prompt": f"Question {number}", "contains": "yes", "max_tokens": 4} for number in range(4)]
    cases += [{"prompt": "Judged", "judge": {"model": "base", "template": "{answer}"}, "max_tokens": 4}]
    await client.put("/v1/adapters/tone/golden", json={"cases": cases})
    parts = client._transport.app.state.parts
    (live,) = parts.registry.versions("tone")
    assert await settled(lambda: (now := parts.golden.results.known(live)) is not None and not now.missing)
    (card,) = (await seen(client))["first"]
    golden = card["versions"][0]["golden"]
    assert (golden["score"], golden["cases"], golden["errors"]) == (1.0, 4, 1) and 0 < golden["low"] < 1
    assert card["problems"] == [
        {"kind": "golden", "version": 1, "text": "1 golden case has no score, because of an error"}
    ]


async def test_a_tenant_sees_its_own_adapters_and_changes_and_no_engine_load(operator, issue, make_adapter):
    await operator.post("/v1/adapters", **upload(make_adapter(0), name="tone"))
    async with await issue("acme") as acme:
        await acme.post("/v1/adapters", **upload(make_adapter(1), name="ours"))
        mine = await seen(acme)
        assert (mine["adapters"], [row["name"] for row in mine["data"]], mine["operator"]) == (1, ["ours"], False)
        assert "running" not in mine["engines"][0]
        changes = (await seen(acme, "/v1/overview/changes"))["data"]
        assert {change["adapter"] for change in changes} == {"ours"}
        assert (await acme.get("/v1/overview/adapters/tone")).status_code == 404
        assert (await acme.get("/v1/overview/adapters/default/tone")).status_code == 404
    every = await seen(operator)
    assert [row["name"] for row in every["data"]] == ["acme/ours", "tone"] and every["engines"][0]["running"] == 0


async def test_changes_come_page_by_page_also_of_adapters_that_are_gone(client, make_adapter):
    await push_two(client, make_adapter)
    await client.delete("/v1/adapters/tone")
    first = await seen(client, "/v1/overview/changes", limit=2)
    assert [change["what"] for change in first["data"]] == ["delete", "delete"] and first["has_more"]
    rest = await seen(client, "/v1/overview/changes", before=first["data"][-1]["id"])
    assert [change["what"] for change in rest["data"]] == ["add", "promote", "add"] and not rest["has_more"]


def test_every_kind_of_change_has_words_on_the_page():
    script = (Path(pages.__file__).parent / "lists.js").read_text()
    words = re.search(r"const WORDS = \{(.*?)\};", script, re.DOTALL)
    assert words and set(re.findall(r"(\w+): \"", words[1])) == KINDS


@pytest.mark.parametrize(
    "query",
    ["/v1/overview?limit=0", "/v1/overview?limit=101", "/v1/overview?offset=-1", f"/v1/overview?search={'a' * 131}",
     "/v1/overview/changes?before=0", f"/v1/overview/changes?before={2**64}", "/v1/overview/adapters/tone?before=x"],
)  # fmt: skip
async def test_what_cannot_be_meant_is_a_bad_request(client, query):
    answer = await client.get(query)
    assert answer.status_code == 400 and "error" in answer.json()


async def test_it_takes_a_key_that_may_change_adapters(operator, issue):
    async with await issue("acme", "inference") as asker:
        for path in ("/v1/overview", "/v1/overview/changes", "/v1/overview/adapters/tone"):
            assert (await asker.get(path)).status_code == 403
            assert (await asker.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401


async def test_an_engine_that_is_down_says_why_and_its_adapters_are_not_ready(client, backend, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter(0)))
    backend.prepare = lambda heir: setattr(heir, "wont_start", "there is no memory left")
    backend.dead = True
    base = client._transport.app.state.parts.fleet.first
    assert await settled(lambda: "no memory" in base.reason)
    answer = await seen(client)
    (engine,) = answer["engines"]
    assert not engine["ready"] and "there is no memory left" in engine["reason"]
    assert [row["ready"] for row in answer["data"]] == [False]
