"""A dry run of a push makes every check and keeps nothing."""

from __future__ import annotations

import pytest

from tests.support.app import push_two, upload
from tests.support.waiting import settled


def kept(config) -> list:
    return [file for folder in ("blobs", "quarantine") for file in (config.data_dir / folder).iterdir()]


async def dry(client, folder, **fields):
    return await client.post("/v1/adapters", **upload(folder, dry_run="true", **fields))


async def test_it_says_what_a_push_would_do_and_keeps_nothing(client, backend, config, make_adapter):
    answer = await dry(client, make_adapter())
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["dry_run"], body["name"], body["version"], body["becomes"]) == (True, "tone", None, "live")
    assert body["rank"] == 2 and body["checks"]["effect"] > 0, "it was loaded and probed"
    assert (await client.get("/v1/adapters/tone")).status_code == 404
    assert await settled(lambda: not backend.held and not kept(config))
    pushed = await client.post("/v1/adapters", **upload(make_adapter()))
    assert pushed.status_code == 201 and pushed.json()["digest"] == body["digest"]


async def test_it_refuses_what_a_push_refuses(client, backend, config, make_adapter):
    too_large = await dry(client, make_adapter(rank=32))
    assert too_large.status_code == 422 and "rank" in too_large.json()["error"]["message"]
    assert (await dry(client, make_adapter(), name="base")).status_code == 409
    backend.effects["tone"] = 0.0
    assert (await dry(client, make_adapter())).status_code == 422, "it changes nothing"
    del backend.effects["tone"]
    stale = await client.post("/v1/adapters", **upload(make_adapter(), dry_run="true"), headers={"if-match": '"7"'})
    assert stale.status_code == 409
    assert (await client.post("/v1/adapters", **upload(make_adapter(), dry_run="perhaps"))).status_code == 400
    assert await settled(lambda: not backend.held and not kept(config))


async def test_of_bytes_that_are_a_version_it_names_the_version_and_leaves_it(client, backend, make_adapter):
    one, two = await push_two(client, make_adapter)
    again = (await dry(client, make_adapter(1))).json()
    assert (again["version"], again["becomes"]) == (2, "live")
    adapter = (await client.get("/v1/adapters/tone")).json()
    assert (adapter["live"], len(adapter["versions"])) == (1, 2)
    assert await settled(lambda: set(backend.held) == {one}), "what takes no traffic does not stay in the engine"
    assert (await dry(client, make_adapter(0))).json()["version"] == 1
    assert one in backend.held
    assert (await client.post("/v1/chat/completions", json={"model": "tone@v2"})).json()["model"] == two


async def test_a_quota_counts_for_it_too(issue, make_adapter):
    full = await issue("acme", adapters=1)
    assert (await full.post("/v1/adapters", **upload(make_adapter(0)))).status_code == 201
    assert (await dry(full, make_adapter(1), name="second")).status_code == 429
    asker = await issue("acme", "inference")
    assert (await dry(asker, make_adapter(1))).status_code == 403


@pytest.mark.parametrize(("fields", "becomes"), [({"promote": "false"}, "stored"), ({}, "live")])
async def test_it_says_whether_the_version_would_be_live(client, make_adapter, fields, becomes):
    assert (await dry(client, make_adapter(), **fields)).json()["becomes"] == becomes
