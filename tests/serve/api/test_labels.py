"""One version of an adapter, its tags, and aliases: fixed names that point at a version until somebody moves them."""

from __future__ import annotations

import pytest

from serve.adapters.registry.registry import MAX_ALIASES
from tests.support.app import ask, push_two, upload
from tests.support.waiting import settled

TONE = "/v1/adapters/tone"


async def point(client, alias, version, **more):
    return await client.put(f"{TONE}/aliases/{alias}", json={"version": version, **more})


async def test_one_version_is_described_as_in_the_list(client, make_adapter):
    await push_two(client, make_adapter)
    listed = (await client.get(TONE)).json()["versions"]
    for number in (1, 2):
        assert (await client.get(f"{TONE}/versions/{number}")).json() == listed[number - 1]
    for path in (f"{TONE}/versions/3", f"{TONE}/versions/0", "/v1/adapters/nobody/versions/1"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get(f"{TONE}/versions/x")).status_code == 400


async def test_an_alias_answers_from_its_version_whatever_is_promoted(client, make_adapter):
    one, two = await push_two(client, make_adapter)
    pointed = await point(client, "stable", 1, why="as approved")
    assert pointed.status_code == 200 and pointed.json()["aliases"] == {"stable": 1}
    await client.post(f"{TONE}/promote", json={"version": 2})
    assert (await ask(client, "tone")).json()["model"] == two
    assert (await ask(client, "tone@stable")).json()["model"] == one
    assert (await point(client, "stable", 2)).json()["versions"][1]["aliases"] == ["stable"]
    assert (await ask(client, "tone@stable")).json()["model"] == two
    history = [row for row in (await client.get(TONE)).json()["history"] if row["what"] == "alias"]
    moves = [(row["label"], row["from_version"], row["to_version"], row["why"]) for row in history]
    assert moves == [("stable", None, 1, "as approved"), ("stable", 1, 2, "")]


async def test_an_alias_is_a_model_in_the_list_until_it_is_removed(client, make_adapter):
    await push_two(client, make_adapter)
    await point(client, "stable", 2)
    cards = {card["id"]: card["root"] for card in (await client.get("/v1/models")).json()["data"]}
    assert cards["tone@stable"] == cards["tone@v2"]
    assert (await client.get("/v1/models/tone@stable")).status_code == 200
    assert (await client.delete(f"{TONE}/aliases/stable", params={"why": "unused"})).json()["aliases"] == {}
    assert (await ask(client, "tone@stable")).status_code == 404
    assert (await client.delete(f"{TONE}/aliases/stable")).status_code == 404
    last = (await client.get(TONE)).json()["history"][-1]
    assert (last["what"], last["label"], last["from_version"], last["why"]) == ("alias_end", "stable", 2, "unused")


async def test_an_aliased_version_is_in_the_engine_before_it_answers_and_stays_when_another_is_promoted(
    client, backend, make_adapter
):
    _, two = await push_two(client, make_adapter)
    assert await settled(lambda: two not in backend.held)
    await point(client, "next", 2)
    assert two in backend.held
    await client.post("/v1/adapters", **upload(make_adapter(2)))
    assert two in backend.held
    await client.delete(f"{TONE}/aliases/next")
    assert await settled(lambda: two not in backend.held), "nobody asks for it any more"


async def test_no_canary_takes_what_asks_for_an_alias(client, make_adapter):
    one, _ = await push_two(client, make_adapter)
    await point(client, "stable", 1)
    await client.post(f"{TONE}/canary", json={"version": 2, "weight": 1})
    assert (await ask(client, "tone@stable")).json()["model"] == one


async def test_a_version_that_an_alias_names_is_deleted_only_with_force(client, make_adapter):
    await push_two(client, make_adapter)
    await point(client, "stable", 2)
    refused = await client.delete(f"{TONE}/versions/2")
    assert refused.status_code == 409 and "tone@stable is v2" in refused.json()["error"]["message"]
    assert (await client.delete(f"{TONE}/versions/2?force=true")).status_code == 200
    assert (await client.get(TONE)).json()["aliases"] == {}
    assert (await client.delete(TONE)).status_code == 200
    await client.post("/v1/adapters", **upload(make_adapter(3)))
    assert (await client.get(TONE)).json()["aliases"] == {}, "a new adapter of the name has none"


@pytest.mark.parametrize("alias", ["v1", "v12", "0123456789ab", "abcdefabcdef", "1st", "a b", "ä", "x" * 33, "-a"])
async def test_an_alias_is_neither_a_version_nor_a_digest(client, make_adapter, alias):
    await push_two(client, make_adapter)
    refused = await point(client, alias, 1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "alias")
    assert "cannot be an alias" in refused.json()["error"]["message"]


async def test_an_adapter_has_so_many_aliases_and_no_more(client, make_adapter):
    await push_two(client, make_adapter)
    answers = [(await point(client, f"a{number}", 1)).status_code for number in range(MAX_ALIASES + 1)]
    assert answers == [200] * MAX_ALIASES + [409]
    assert (await point(client, "a0", 2)).status_code == 200, "it may be moved all the same"
    assert (await point(client, "a1", 9)).status_code == 404


async def test_aliases_and_tags_outlive_a_restart(connect, config, backend, make_adapter):
    async with connect(config) as client:
        await push_two(client, make_adapter)
        await point(client, "stable", 2)
        await client.put(f"{TONE}/versions/1/tags", json={"tags": ["seed 0"]})
    backend.held.clear()
    backend.numbers.clear()
    async with connect(config) as client:
        adapter = (await client.get(TONE)).json()
        assert adapter["aliases"] == {"stable": 2} and adapter["versions"][0]["tags"] == ["seed 0"]
        assert adapter["versions"][1]["resident"], "it gets traffic"


async def test_tags_are_written_on_a_version_and_in_the_history(client, make_adapter):
    await push_two(client, make_adapter)
    tagged = await client.put(f"{TONE}/versions/2/tags", json={"tags": ["run 17", "über", "run 17"]})
    assert tagged.json()["tags"] == ["run 17", "über"]
    last = (await client.get(TONE)).json()["history"][-1]
    assert (last["what"], last["to_version"], last["label"]) == ("tag", 2, '["run 17", "über"]')
    assert (await client.put(f"{TONE}/versions/2/tags", json={"tags": []})).json()["tags"] == []
    for wrong in (["x"] * 17, [""], [" x"], ["x" * 65], ["a\nb"], [1], "x"):
        refused = await client.put(f"{TONE}/versions/2/tags", json={"tags": wrong})
        assert refused.status_code == 400, wrong
    assert (await client.put(f"{TONE}/versions/9/tags", json={"tags": []})).status_code == 404


async def test_other_tenants_may_ask_a_shared_adapters_alias_and_change_nothing(issue, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    pushed = (await acme.post("/v1/adapters", **upload(make_adapter(0), visibility="shared"))).json()["id"]
    await point(acme, "stable", 1)
    assert (await ask(globex, "acme/tone@stable")).json()["model"] == pushed
    assert "acme/tone@stable" in [card["id"] for card in (await globex.get("/v1/models")).json()["data"]]
    for answer in (
        await globex.put("/v1/adapters/acme/tone/aliases/stable", json={"version": 1}),
        await globex.delete("/v1/adapters/acme/tone/aliases/stable"),
        await globex.put("/v1/adapters/acme/tone/versions/1/tags", json={"tags": []}),
        await globex.get("/v1/adapters/acme/tone/versions/1"),
    ):
        assert answer.status_code == 404
    asker = await issue("acme", "inference")
    assert (await point(asker, "stable", 1)).status_code == 403
