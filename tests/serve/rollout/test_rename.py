"""An adapter gets another name: nobody who asks the old one notices, until the old one is removed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.support.app import ask, canary, push_two, upload
from tests.support.backend import FakeBackend


async def rename(client, name="tone", to="voice", **more):
    return await client.post(f"/v1/adapters/{name}/rename", json={"to": to, **more})


async def said(client, model):
    return (await ask(client, model)).json()["model"]


async def test_the_old_name_leads_to_the_new_one_with_versions_aliases_and_history(client, config, make_adapter):
    old = await push_two(client, make_adapter)
    new = [id.replace("tone@", "voice@") for id in old]
    await client.put("/v1/adapters/tone/aliases/next", json={"version": 2})
    await client.put("/v1/adapters/tone/golden", json={"cases": [{"prompt": "x", "contains": "y"}]})
    done = await rename(client, why="clearer")
    assert done.status_code == 200, done.text
    assert (done.json()["name"], done.json()["live"], done.json()["former_names"]) == ("voice", 1, ["tone"])
    for name in ("tone", "voice"):
        asked = [await said(client, f"{name}{at}") for at in ("", "@v2", "@next", f"@{old[0][-12:]}")]
        assert asked == [new[0], new[1], new[1], new[0]]
    shown = (await client.get("/v1/adapters/voice")).json()
    assert [event["what"] for event in shown["history"]][:2] == ["add", "promote"]
    assert (shown["history"][-1]["what"], shown["history"][-1]["label"]) == ("rename", "tone to voice")
    assert (await client.get("/v1/adapters/voice/golden")).status_code == 200
    gone = await client.get("/v1/adapters/tone")
    assert gone.status_code == 404 and "called `voice` now" in gone.json()["error"]["message"]
    assert [row["name"] for row in (await client.get("/v1/adapters")).json()["data"]] == ["voice"]


async def test_removing_the_old_name_leaves_the_adapter_and_frees_the_name(client, make_adapter):
    await push_two(client, make_adapter)
    await rename(client)
    taken = await client.post("/v1/adapters", **upload(make_adapter(2)))
    assert taken.status_code == 409 and "renamed to voice" in taken.json()["error"]["message"]
    assert (await client.delete("/v1/adapters/tone")).json() == {"name": "tone", "deleted": []}
    assert (await ask(client, "tone")).status_code == 404
    assert (await ask(client, "voice")).status_code == 200
    assert (await client.delete("/v1/adapters/tone")).status_code == 404
    assert (await client.post("/v1/adapters", **upload(make_adapter(2)))).json()["version"] == 1
    assert (await client.get("/v1/adapters/voice")).json()["history"][-1]["what"] == "rename_end"


async def test_names_follow_one_another_and_back(client, make_adapter):
    (first, _) = await push_two(client, make_adapter)
    await rename(client, "tone", "voice")
    await rename(client, "voice", "style")
    for name in ("tone", "voice", "style"):
        assert await said(client, name) == first.replace("tone@", "style@")
    back = await rename(client, "style", "tone")
    assert back.status_code == 200 and back.json()["former_names"] == ["style", "voice"]
    assert await said(client, "voice") == first
    await client.delete("/v1/adapters/tone")
    for name in ("tone", "voice", "style"):
        assert (await ask(client, name)).status_code == 404
    assert (await client.post("/v1/adapters", **upload(make_adapter(2), name="voice"))).status_code == 201


async def test_what_cannot_be_renamed_says_why_and_changes_nothing(operator, issue, make_adapter):
    await push_two(operator, make_adapter)
    await operator.post("/v1/adapters", **upload(make_adapter(2), name="other"))
    await operator.post("/v1/adapters", **upload(make_adapter(3), name="dead"))
    await operator.delete("/v1/adapters/dead")
    answers = {name: (await rename(operator, to=name)).status_code for name in ("other", "dead", "base", "pin", "../x")}
    assert answers == {"other": 409, "dead": 409, "base": 409, "pin": 400, "../x": 400}
    assert (await rename(operator, "none")).status_code == 404
    assert (await rename(await issue("acme"), "default/tone")).status_code == 404
    await canary(operator, 0.5)
    held = await rename(operator)
    assert held.status_code == 409 and "canary" in held.json()["error"]["message"]
    expects = await operator.post("/v1/adapters/tone/rename", json={"to": "voice"}, headers={"if-match": '"9"'})
    assert expects.status_code == 409
    assert [row["name"] for row in (await operator.get("/v1/adapters")).json()["data"]] == ["other", "tone"]


async def test_what_cannot_be_renamed_costs_no_other_adapter_its_place_in_the_engine(client, backend, make_adapter):
    await push_two(client, make_adapter)
    await client.post("/v1/adapters", **upload(make_adapter(0), name="voice"))
    await client.post("/v1/adapters", **upload(make_adapter(1), name="other"))
    await canary(client, 0.5)
    held = dict(backend.held)
    for name in ("voice", "other", "free"):
        assert (await rename(client, to=name)).status_code == 409
    await client.delete("/v1/adapters/tone/canary")
    expects = await client.post("/v1/adapters/tone/rename", json={"to": "free"}, headers={"if-match": '"9"'})
    assert expects.status_code == 409
    assert backend.held == held


async def test_another_tenant_s_names_stay_apart(issue, make_adapter):
    acme, default = await issue("acme"), await issue("default")
    await acme.post("/v1/adapters", **upload(make_adapter(0)))
    assert (await rename(acme)).json()["tenant"] == "acme"
    assert (await ask(acme, "tone")).json()["model"].startswith("acme/voice@")
    for name in ("tone", "voice", "acme/tone", "acme/voice"):
        assert (await ask(default, name)).status_code == 404
    assert (await default.delete("/v1/adapters/acme%2Ftone")).status_code == 404
    assert (await ask(acme, "tone")).status_code == 200


async def test_a_running_answer_ends_under_the_old_name_and_a_restart_knows_both(
    connect, config, make_adapter, tiny_model
):
    backend = FakeBackend(str(tiny_model))
    async with connect(config, backend) as client:
        (first, _) = await push_two(client, make_adapter)
        asked = [asyncio.create_task(ask(client, "tone")) for _ in range(20)]
        await asyncio.sleep(0)
        assert (await rename(client)).status_code == 200
        answers = [await one for one in asked]
        assert {answer.status_code for answer in answers} == {200}
    async with connect(replace(config), FakeBackend(str(tiny_model))) as client:
        assert await said(client, "tone") == first.replace("tone@", "voice@") == await said(client, "voice")
