from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from serve.config import keys_hashed
from tests.support.app import ask, upload
from tests.support.waiting import settled


async def test_an_upload_answers_under_its_name_and_says_which_version_answered(client, make_adapter):
    pushed = await client.post("/v1/adapters", **upload(make_adapter()))
    assert pushed.status_code == 201
    body = pushed.json()
    assert (body["name"], body["version"], body["live"], body["resident"]) == ("tone", 1, True, True)
    assert body["id"] == f"tone@{body['digest'][:12]}"
    for model in ("tone", "tone@v1", body["id"]):
        assert (await ask(client, model)).json() == {"model": body["id"]}


async def test_the_same_bytes_are_the_same_version_and_other_bytes_the_next(client, make_adapter):
    first = await client.post("/v1/adapters", **upload(make_adapter(0)))
    again = await client.post("/v1/adapters", **upload(make_adapter(0)))
    other = await client.post("/v1/adapters", **upload(make_adapter(1)))
    assert [r.status_code for r in (first, again, other)] == [201, 200, 201]
    assert [r.json()["version"] for r in (first, again, other)] == [1, 1, 2]


async def test_a_promote_retires_the_old_version_when_its_last_answer_ends(client, backend, make_adapter):
    old = (await client.post("/v1/adapters", **upload(make_adapter(0)))).json()["id"]
    backend.flow.clear()
    answering = asyncio.create_task(ask(client, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    new = (await client.post("/v1/adapters", **upload(make_adapter(1)))).json()["id"]
    await asyncio.sleep(0.2)
    assert set(backend.held) == {old, new}, "the old version left while it was answering"
    assert (await ask(client, "tone")).json() == {"model": new}
    backend.flow.set()
    models = [
        json.loads(line[6:])["model"] for line in (await answering).text.splitlines() if line.startswith("data: {")
    ]
    assert models == [old, old]
    assert await settled(lambda: set(backend.held) == {new})


async def test_a_version_that_is_not_promoted_answers_only_by_its_number(client, backend, make_adapter):
    one = (await client.post("/v1/adapters", **upload(make_adapter(0)))).json()
    two = (await client.post("/v1/adapters", **upload(make_adapter(1), promote="false"))).json()
    assert not two["live"]
    assert (await ask(client, "tone")).json() == {"model": one["id"]}
    assert (await ask(client, "tone@v2")).json() == {"model": two["id"]}


async def test_rollback_returns_to_what_was_live_before(client, make_adapter):
    ids = [(await client.post("/v1/adapters", **upload(make_adapter(seed)))).json()["id"] for seed in (0, 1)]
    done = await client.post("/v1/adapters/tone/rollback")
    assert done.json()["id"] == ids[0]
    assert (await ask(client, "tone")).json() == {"model": ids[0]}
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    assert [row["what"] for row in history].count("rollback") == 1


async def test_a_promote_that_expects_another_version_changes_nothing(client, make_adapter):
    for seed in (0, 1):
        await client.post("/v1/adapters", **upload(make_adapter(seed)))
    late = await client.post("/v1/adapters/tone/promote", json={"version": 1, "expected_version": 1})
    assert late.status_code == 409
    assert (await client.get("/v1/adapters/tone")).json()["live"] == 2


CHANGES = {
    "canary": ("POST", "/canary", {"version": 1, "weight": 0.5}),
    "shadow": ("POST", "/shadow", {"version": 1, "weight": 0.5}),
    "pin": ("POST", "/pin", {}),
    "unpin": ("DELETE", "/pin", None),
    "visibility": ("POST", "/visibility", {"visibility": "shared"}),
    "rollback": ("POST", "/rollback", None),
    "promote": ("POST", "/promote", {"version": 2}),
    "delete a version": ("DELETE", "/versions/1", None),
    "delete": ("DELETE", "", None),
}


async def test_if_match_holds_every_change_to_what_the_caller_has_seen(client, make_adapter):
    none = {"if-match": '"0"'}
    for seed, seen, status in ((0, none, 201), (1, none, 409), (1, {"if-match": '"1"'}, 201)):
        assert (await client.post("/v1/adapters", **upload(make_adapter(seed)), headers=seen)).status_code == status
    for method, path, body in CHANGES.values():
        before = await client.get("/v1/adapters/tone")
        url = f"/v1/adapters/tone{path}"
        for stale in ('"7"', '"0"', "v3"):
            late = await client.request(method, url, json=body, headers={"if-match": stale})
            assert (late.status_code, late.json()["error"]["code"]) == (409, "version_mismatch"), late.text
        for odd in ('"one"', "", '"1", "2"', b"\xb2", "-1"):
            assert (await client.request(method, url, json=body, headers={"if-match": odd})).status_code == 400
        assert (await client.get("/v1/adapters/tone")).json() == before.json()
        seen = {"if-match": before.headers["etag"]}
        assert (await client.request(method, url, json=body, headers=seen)).is_success, url
    for seed in (0, 1):
        assert (await client.post("/v1/adapters", **upload(make_adapter(seed)), headers={"if-match": "*"})).is_success
    both = {"version": 3, "expected_version": 3}
    odd = await client.post("/v1/adapters/tone/promote", json=both, headers={"if-match": '"4"'})
    assert odd.status_code == 400 and "send one" in odd.json()["error"]["message"]


async def test_the_history_says_who_did_what_and_why(client, make_adapter):
    for seed, why in ((0, "the first"), (1, "better data")):
        await client.post("/v1/adapters", **upload(make_adapter(seed), why=why))
    await client.post("/v1/adapters/tone/rollback", json={"why": "complaints"})
    await client.delete("/v1/adapters/tone/versions/2", params={"why": "nobody needs it"})
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    told = {(event["what"], event["why"]) for event in history}
    assert {("add", "better data"), ("rollback", "complaints"), ("delete", "nobody needs it")} <= told


async def test_an_upload_that_the_disk_has_no_room_for_is_refused_before_it_is_read(client, make_adapter, monkeypatch):
    async def never():
        raise AssertionError("it was read")
        yield b""

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 << 20))
    headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str(100 << 20)}
    full = await client.post("/v1/adapters", content=never(), headers=headers)
    assert full.status_code == 507 and "100 MiB more" in full.json()["error"]["message"]


async def test_bytes_that_come_again_while_a_refused_push_of_them_is_cleared_away_stay(connect, config, make_adapter):
    async with connect(config) as client:
        for _ in range(3):
            refused = await client.post("/v1/adapters", **upload(make_adapter()), headers={"if-match": '"7"'})
            assert refused.status_code == 409
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        async with asyncio.timeout(60):
            await client._transport.app.state.parts.lifecycle.settle()
        assert len(list((config.data_dir / "blobs").iterdir())) == 1
        assert (await ask(client, "tone")).status_code == 200


async def test_a_deleted_adapter_is_gone_from_the_engine_and_the_disk(client, backend, config, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    assert (await client.delete("/v1/adapters/tone")).json() == {"name": "tone", "deleted": [1]}
    assert (await ask(client, "tone")).status_code == 404
    assert await settled(lambda: not backend.held and not list((config.data_dir / "blobs").iterdir()))


async def test_the_live_version_is_deleted_only_with_force(client, make_adapter):
    for seed in (0, 1):
        await client.post("/v1/adapters", **upload(make_adapter(seed)))
    assert (await client.delete("/v1/adapters/tone/versions/2")).status_code == 409
    assert (await client.delete("/v1/adapters/tone/versions/2?force=true")).json()["deleted"] == [2]
    assert (await client.get("/v1/adapters/tone")).json()["live"] == 1


async def test_an_adapter_that_the_engine_refuses_leaves_nothing(client, backend, config, make_adapter):
    backend.refuse = "the engine cannot load this adapter: its kernels know no rank 2"
    refused = await client.post("/v1/adapters", **upload(make_adapter()))
    assert refused.status_code == 422
    assert refused.json()["error"]["message"] == backend.refuse
    assert (await client.get("/v1/adapters")).json()["data"] == []
    kept = [config.data_dir / "blobs", config.data_dir / "quarantine"]
    assert await settled(lambda: not any(file for folder in kept for file in folder.iterdir()))


async def test_a_bad_upload_changes_nothing(client, config, make_adapter):
    folder = make_adapter(rank=32)
    refused = await client.post("/v1/adapters", **upload(folder))
    assert refused.status_code == 422
    assert "rank" in refused.json()["error"]["message"]
    assert not list((config.data_dir / "blobs").iterdir())
    assert not list((config.data_dir / "quarantine").iterdir())


async def test_the_name_of_the_base_is_taken(client, make_adapter):
    assert (await client.post("/v1/adapters", **upload(make_adapter(), name="base"))).status_code == 409


async def test_a_restart_keeps_versions_pointers_and_history(connect, config, backend, make_adapter):
    async with connect(config) as client:
        for seed in (0, 1):
            await client.post("/v1/adapters", **upload(make_adapter(seed)))
        await client.post("/v1/adapters/tone/promote", json={"version": 1})
        before = (await client.get("/v1/adapters/tone")).json()
    backend.held.clear()
    backend.numbers.clear()
    async with connect(config) as client:
        after = (await client.get("/v1/adapters/tone")).json()
        assert {**after, "versions": None} == {**before, "versions": None}
        assert [v["resident"] for v in after["versions"]] == [True, False]
        assert (await ask(client, "tone@v2")).json()["model"] == after["versions"][1]["id"]


async def test_models_lists_the_base_and_every_version_with_its_parent(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("tone", "base"), ("tone@v1", "base")]
    assert (await client.get("/v1/models/tone")).json()["root"] == cards[1]["root"]
    (engine,) = (await client.get("/v1/engines")).json()["data"]
    assert cards[0]["weights"] == engine["weights"] == "bfloat16; output layer bfloat16"
    assert (await client.get("/v1/models/nobody")).status_code == 404


async def test_concurrent_pushes_of_one_name_number_themselves(client, make_adapter):
    pushes = [client.post("/v1/adapters", **upload(make_adapter(seed))) for seed in range(6)]
    versions = [response.json()["version"] for response in await asyncio.gather(*pushes)]
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]


async def test_more_adapters_than_the_engine_holds_take_turns(client, backend, make_adapter):
    ids = [
        (await client.post("/v1/adapters", **upload(make_adapter(seed), name=f"tone-{seed}"))).json()["id"]
        for seed in range(8)
    ]
    answers = [(await ask(client, f"tone-{seed}")).json()["model"] for seed in range(8)]
    assert answers == ids
    assert await settled(lambda: len(backend.held) <= backend.max_resident)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/adapters/nobody/promote", {"version": 1}, 404),
        ("POST", "/v1/adapters/nobody/promote", {"version": "x"}, 400),
        ("POST", "/v1/adapters/nobody/promote", {"versoin": 1}, 400),
        ("POST", "/v1/adapters/nobody/rollback", None, 404),
        ("GET", "/v1/adapters/nobody", None, 404),
        ("DELETE", "/v1/adapters/nobody", None, 404),
        ("DELETE", "/v1/adapters/nobody/versions/1", None, 404),
        ("GET", "/v1/nothing", None, 404),
        ("PUT", "/v1/adapters", None, 405),
    ],
)
async def test_every_error_has_openais_shape(client, method, path, body, status):
    response = await client.request(method, path, json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}


async def test_inference_and_admin_are_different_scopes(connect, config, make_adapter):
    keyed = replace(config, api_keys=keys_hashed(["ask"]), admin_keys=keys_hashed(["run"]))
    async with connect(keyed) as client:
        for path, scope in (
            ("/v1/models", "ask"),
            ("/v1/adapters", "run"),
            ("/v1/engines", "run"),
            ("/metrics", "run"),
        ):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
            below = await client.get(path, headers={"authorization": "Bearer ask"})
            assert below.status_code == (200 if scope == "ask" else 403)
            assert (await client.get(path, headers={"authorization": "Bearer run"})).status_code == 200
        assert (await ask(client, "base")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200


async def test_metrics_hold_both_ours_and_the_engines_without_the_unbounded_series(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    await ask(client, "tone")
    await ask(client, "somebody's secret")
    text = (await client.get("/metrics")).text
    assert 'loradock_requests_total{adapter="tone",code="200",finish_reason="stop",version="v1"} 1.0' in text
    assert 'loradock_requests_total{adapter="other",code="404",finish_reason="",version=""} 1.0' in text
    assert 'loradock_adapter_state{adapter="tone",state="slot",version="v1"} 1.0' in text
    assert "vllm:tokens_total" in text
    assert "secret" not in text
    (requests,) = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert "a,b" not in requests, "that one is ours: it does not grow"
    assert "a,b" in (await client.get("/metrics/engine")).text


async def test_ready_turns_false_when_the_engine_dies(client, backend):
    assert (await client.get("/ready")).status_code == 200
    backend.dead = True
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200


async def test_only_the_engines_route_waits_for_a_busy_backend(client, backend, make_adapter):
    asked, free = [], asyncio.Event()
    really = backend.resident

    async def resident():
        asked.append(1)
        await free.wait()
        return await really()

    backend.resident = resident
    for seed in (0, 1):
        assert (await client.post("/v1/adapters", **upload(make_adapter(seed)))).json()["resident"] is True
    share = {"version": 1, "weight": 0.5}
    for method, path, body in [
        ("GET", "", None), ("GET", "/tone", None), ("POST", "/tone/canary", share), ("POST", "/tone/shadow", share),
        ("POST", "/tone/pin", None), ("DELETE", "/tone/pin", None), ("POST", "/tone/promote", {"version": 1}),
        ("POST", "/tone/rollback", None), ("DELETE", "/tone/versions/2?force=true", None),
    ]:  # fmt: skip
        done = await asyncio.wait_for(client.request(method, f"/v1/adapters{path}", json=body), 60)
        assert done.status_code == 200, f"{method} {path}"
    assert asked == []
    backend.flow.clear()
    engines = asyncio.create_task(client.get("/v1/engines"))
    assert await settled(lambda: asked)
    answering = asyncio.create_task(ask(client, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    free.set()
    told = (await engines).json()["data"][0]
    assert (told["leases"], told["running"]) == (1, 1), "it told what was before it waited"
    backend.flow.set()
    await answering


async def test_resident_says_what_is_there_to_stay(client, backend, make_adapter):
    for seed in (0, 1):
        await client.post("/v1/adapters", **upload(make_adapter(seed)))
    told = (await client.get("/v1/adapters/tone")).json()["versions"]
    assert [version["resident"] for version in told] == [False, True], "a retired version still counts"


async def test_openmetrics_keeps_the_engines_names(client):
    told = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert 'vllm:tokens_total{model="base"} 1.0' in told.text
    assert "vllm_" not in told.text


async def test_a_push_is_taken_as_soon_as_the_server_says_that_it_is_ready(connect, config, make_adapter, monkeypatch):
    started, learned = connect(config), asyncio.Event()

    async def learn(models):
        await learned.wait()

    monkeypatch.setattr(started.app.state.parts._watched_bases, "learn", learn)
    transport = httpx.ASGITransport(started.app)
    async with (
        started.app.router.lifespan_context(started.app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        asyncio.timeout(30),
    ):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        learned.set()


async def test_adapters_are_listed_whole_or_by_pages(client, make_adapter):
    for number in range(5):
        pushed = await client.post("/v1/adapters", **upload(make_adapter(number), name=f"adapter-{number}"))
        assert pushed.status_code == 201, pushed.text
    whole = (await client.get("/v1/adapters")).json()
    names = [f"adapter-{number}" for number in range(5)]
    assert [row["name"] for row in whole["data"]] == names and whole["object"] == "list" and not whole["has_more"]
    pages, after = [], ""
    while True:
        page = (await client.get("/v1/adapters", params={"limit": 2, "after": after})).json()
        pages.append(page["data"])
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [len(page) for page in pages] == [2, 2, 1] and [row for page in pages for row in page] == whole["data"]
    assert (await client.get("/v1/adapters", params={"after": "zzz"})).json() == {
        "object": "list", "data": [], "has_more": False, "last_id": None,
    }  # fmt: skip
    assert (await client.get("/v1/adapters", params={"limit": 0})).status_code == 400


async def test_version_says_what_is_changed_in_vllm(client):
    body = (await client.get("/version")).json()
    assert body["vllm_patches"] == {"on": ["media"], "off": {"titles": "vllm_patches leaves it out"}}
