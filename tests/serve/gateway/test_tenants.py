"""Two tenants on one server: neither can see, use, change or even suspect what the other keeps for itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import re._parser as sre
from dataclasses import replace

import pytest

from serve.adapters.adapter import CONFIG, TOKENIZER
from serve.config import keys_hashed
from serve.gateway.request import PATHS, STORED
from serve.gateway.tenant_isolation import tenant_salt
from tests.support.app import ask, issued, upload
from tests.support.waiting import settled
from tests.support.watched_traffic import Engine

BODIES = {
    ("post", "/v1/adapters/{name}/rename"): {"json": {"to": "other"}},
    ("post", "/v1/adapters/{name}/promote"): {"json": {"version": 1}},
    ("post", "/v1/adapters/{name}/canary"): {"json": {"version": 1, "weight": 0.5}},
    ("post", "/v1/adapters/{name}/shadow"): {"json": {"version": 1, "weight": 0.5}},
    ("post", "/v1/adapters/{name}/pin"): {"json": {"version": 1}},
    ("post", "/v1/adapters/{name}/drift/acknowledge"): {"json": {"version": 1}},
    ("post", "/v1/adapters/{name}/drift/accept"): {"json": {"version": 1}},
    ("post", "/v1/adapters/{name}/baseline"): {"json": {"prompts": ["x"] * 20}},
    ("put", "/v1/adapters/{name}/golden"): {"json": {"cases": [{"prompt": "x", "equals": "y"}]}},
    ("post", "/v1/adapters/{name}/visibility"): {"json": {"visibility": "shared"}},
    ("put", "/v1/adapters/{name}/aliases/{alias}"): {"json": {"version": 1}},
    ("put", "/v1/adapters/{name}/versions/{number}/tags"): {"json": {"tags": []}},
    ("post", "/v1/keys"): {"json": {"name": "more", "tenant": "acme"}},
}


def spelled_out(pattern) -> set[str]:
    """Every text that a pattern of literals, choices and question marks matches."""
    found = {""}
    for kind, what in pattern:
        if kind is sre.LITERAL:
            more = {chr(what)}
        elif kind is sre.SUBPATTERN:
            more = spelled_out(what[3])
        elif kind is sre.BRANCH:
            more = set().union(*map(spelled_out, what[1]))
        else:
            assert kind is sre.MAX_REPEAT and what[:2] == (0, 1), f"{kind} is new here"
            more = {"", *spelled_out(what[2])}
        found = {before + after for before in found for after in more}
    return found


INFERENCE = sorted(spelled_out(sre.parse(PATHS.pattern)))


@pytest.fixture
async def acme(issue):
    return await issue("acme", name="anna")


@pytest.fixture
async def globex(issue):
    """Who walks every route with every spelling."""
    return await issue("globex", name="gus", changes_per_minute=100_000, reads_per_minute=100_000)


@pytest.fixture
async def secret(acme, make_adapter):
    """Acme's private adapter with two versions; the second is live."""
    pushed = [await acme.post("/v1/adapters", **upload(make_adapter(seed), name="secret")) for seed in (0, 1)]
    assert [response.status_code for response in pushed] == [201, 201]
    return [response.json() for response in pushed]


def spellings(versions) -> list[tuple[str, str]]:
    """(every way to name the secret, the same way to name what is not there)."""
    bare = [("secret", "mirage"), ("secret@v1", "mirage@v1"), ("secret@v2", "mirage@v2"), ("secret@v9", "mirage@v9")]
    bare += [(f"secret@{one['digest'][:12]}", f"mirage@{one['digest'][:12][::-1]}") for one in versions]
    return [(f"{prefix}{there}", f"{prefix}{made_up}") for prefix in ("", "acme/") for there, made_up in bare]


def seen(response, name) -> tuple:
    """All that a client can tell from an answer, but for the name that it sent itself."""
    headers = {key: value for key, value in response.headers.items() if key not in ("x-request-id", "content-length")}
    return response.status_code, headers, response.text.replace(name, "NAME")


async def state(owner) -> dict:
    """The secret as its owner sees it, but for where it is loaded just now."""
    told = (await owner.get("/v1/adapters/secret")).json()
    return {**told, "versions": [{**version, "resident": None} for version in told["versions"]]}


async def test_no_route_tells_a_private_adapter_from_one_that_does_not_exist(operator, acme, globex, secret):
    app = operator._transport.app
    before = await state(acme)
    walked = 0
    for (path, methods), (there, made_up) in itertools.product(app.openapi()["paths"].items(), spellings(secret)):
        for method in methods:
            if (method, path) == ("post", "/v1/adapters"):
                continue  # what another tenant has does not stand in the way: see below
            answers = []
            for name in (there, made_up):
                # A parameter that is not known here fails: say what a stranger could put there.
                url = path.format(name=name, number=1, id=name, engine=name, alias="stable", file="adapter_config.json")
                response = await globex.request(method, url, **BODIES.get((method, path), {}))
                answers.append(seen(response, name))
            assert answers[0] == answers[1], f"{method} {path} with {there}"
            if "{name}" in path and not path.endswith("/mix"):  # which makes an adapter of one's own
                assert answers[0][0] == 404, f"{method} {path} with {there}"
            told = answers[0][2]
            assert not any(one["digest"][:12] in told or "secret" in told or "anna" in told for one in secret)
            walked += 1
    assert walked > 100
    assert await state(acme) == before


def test_the_inference_routes_are_all_known():
    assert {"/v1/chat/completions", "/v1/responses", "/tokenize", "/v2/rerank"} < set(INFERENCE)
    assert all(PATHS.fullmatch(path) for path in INFERENCE)


@pytest.mark.parametrize("path", INFERENCE)
async def test_no_inference_route_tells_it_either(acme, globex, secret, backend, path):
    for there, made_up in spellings(secret):
        for stream in (False, True):
            answers = []
            for name in (there, made_up):
                response = await globex.post(path, json={"model": name, "messages": [], "stream": stream})
                answers.append(seen(response, name))
            assert answers[0] == answers[1], there
            assert answers[0][0] == 404
    assert not backend.bodies
    answer = await acme.post(path, json={"model": "secret", "messages": []})
    assert answer.json() == {"model": secret[1]["id"]}


async def test_the_lists_of_one_tenant_hold_nothing_of_another(globex, acme, operator, secret):
    assert [card["id"] for card in (await globex.get("/v1/models")).json()["data"]] == ["base"]
    assert (await globex.get("/v1/adapters")).json()["data"] == []
    mine = [card["id"] for card in (await acme.get("/v1/models")).json()["data"]]
    assert mine == ["base", "secret@v1", "secret", "secret@v2"]
    all_of_them = [card["id"] for card in (await operator.get("/v1/models")).json()["data"]]
    assert all_of_them == ["base", "acme/secret@v1", "acme/secret", "acme/secret@v2"]
    assert [row["name"] for row in (await operator.get("/v1/adapters")).json()["data"]] == ["acme/secret"]


async def test_no_client_is_told_where_the_servers_files_are(operator, acme, secret, tiny_model):
    folder = str(tiny_model)
    for path in ("/v1/models", "/v1/models/base", "/v1/adapters", "/v1/adapters/secret", "/version", "/ready"):
        assert folder not in (await acme.get(path)).text, path
    assert folder not in json.dumps(secret)
    base = (await acme.get("/v1/models/base")).json()
    assert base["root"] == "base"
    versions = (await acme.get("/v1/adapters/secret")).json()["versions"]
    assert [version["checks"]["base_model"] for version in versions] == ["base", "base"]
    assert (await operator.get("/v1/models/base")).json()["root"] == folder


async def test_metrics_are_the_operators_and_name_the_tenant(globex, acme, operator, secret):
    await ask(acme, "secret")
    assert (await globex.get("/metrics")).status_code == 403
    text = (await operator.get("/metrics")).text
    assert 'loradock_requests_total{adapter="acme/secret",code="200",finish_reason="stop",version="v2"} 1.0' in text
    assert "loradock_audit_failures_total 0.0" in text


async def test_two_tenants_adapters_of_one_name_and_the_same_bytes_never_meet(
    acme, globex, secret, backend, config, make_adapter
):
    twin = await globex.post("/v1/adapters", **upload(make_adapter(1), name="secret"))
    assert (twin.status_code, twin.json()["version"], twin.json()["name"]) == (201, 1, "secret")
    digest = secret[1]["digest"][:12]
    assert twin.json()["id"] == f"globex/secret@{digest}"
    assert {f"acme/secret@{digest}", f"globex/secret@{digest}"} <= set(backend.held)
    for client, tenant in ((acme, "acme"), (globex, "globex")):
        for model in ("secret", f"secret@{digest}", f"{tenant}/secret@{digest}"):
            assert (await ask(client, model)).json() == {"model": f"{tenant}/secret@{digest}"}
    # One tenant's deletion leaves the other its bytes.
    assert (await acme.delete("/v1/adapters/secret")).status_code == 200
    assert await settled(lambda: set(backend.held) == {f"globex/secret@{digest}"})
    blobs = config.data_dir / "blobs"
    assert await settled(lambda: [blob.name for blob in blobs.iterdir()] == [twin.json()["digest"]])
    assert (await ask(globex, "secret")).status_code == 200
    assert (await ask(acme, "secret")).status_code == 404


async def test_an_operator_manages_any_tenants_adapter_by_its_full_name(operator, acme, secret):
    assert (await operator.get("/v1/adapters/secret")).status_code == 404
    done = await operator.post("/v1/adapters/acme/secret/promote", json={"version": 1})
    assert (done.status_code, done.json()["name"]) == (200, "acme/secret")
    assert (await ask(acme, "secret")).json() == {"model": secret[0]["id"]}
    assert (await operator.post("/v1/adapters/acme%2Fsecret/rollback")).status_code == 200
    assert (await operator.delete("/v1/adapters/acme/secret/versions/1")).json()["deleted"] == [1]
    assert (await operator.delete("/v1/adapters/acme/secret")).json()["deleted"] == [2]


async def test_a_shared_adapter_answers_everybody_and_changes_for_its_owner_alone(acme, globex, make_adapter):
    shared = (await acme.post("/v1/adapters", **upload(make_adapter(), visibility="shared"))).json()
    assert shared["visibility"] == "shared"
    assert (await ask(globex, "acme/tone")).json() == {"model": shared["id"]}
    assert (await ask(globex, shared["id"])).json() == {"model": shared["id"]}
    # Its short name stays free: or acme could step in for an adapter that globex has deleted.
    assert (await ask(globex, "tone")).status_code == 404
    assert [card["id"] for card in (await globex.get("/v1/models")).json()["data"]] == [
        "base",
        "acme/tone",
        "acme/tone@v1",
    ]
    for method, path in (("GET", ""), ("POST", "/rollback"), ("DELETE", ""), ("DELETE", "/versions/1")):
        assert (await globex.request(method, f"/v1/adapters/acme/tone{path}")).status_code == 404
    again = await acme.post("/v1/adapters", **upload(make_adapter(), visibility="private"))
    assert (again.status_code, again.json()["visibility"]) == (200, "private")
    assert (await ask(globex, "acme/tone")).status_code == 404
    changes = [row["what"] for row in (await acme.get("/v1/adapters/tone")).json()["history"]]
    assert changes == ["add", "promote", "share", "unshare"]


async def test_a_name_that_was_deleted_is_not_born_shared(acme, globex, make_adapter):
    await acme.post("/v1/adapters", **upload(make_adapter(), visibility="shared"))
    await acme.delete("/v1/adapters/tone")
    assert (await acme.post("/v1/adapters", **upload(make_adapter(1)))).json()["visibility"] == "private"


async def test_what_the_operators_share_answers_under_its_name_until_a_tenant_has_its_own(operator, acme, make_adapter):
    common = (await operator.post("/v1/adapters", **upload(make_adapter(0), visibility="shared"))).json()
    assert common["id"] == f"tone@{common['digest'][:12]}"
    assert (await ask(acme, "tone")).json() == {"model": common["id"]}
    own = (await acme.post("/v1/adapters", **upload(make_adapter(1)))).json()
    assert (await ask(acme, "tone")).json() == {"model": own["id"]}
    assert (await ask(acme, "default/tone")).json() == {"model": common["id"]}
    listed = {card["id"]: card["root"] for card in (await acme.get("/v1/models")).json()["data"]}
    assert (listed["tone"], listed["default/tone"]) == (own["id"], common["id"])
    for id in listed.keys() - {"base"}:
        assert (await ask(acme, id)).json() == {"model": listed[id]}


@pytest.mark.parametrize("name", ["acme/tone", "default/tone", "../tone", "/tone", "tone/"])
async def test_nobody_pushes_into_another_tenant(operator, acme, make_adapter, name):
    for client in (acme, operator):
        assert (await client.post("/v1/adapters", **upload(make_adapter(), name=name))).status_code == 400


TRAFFIC = [
    ("POST", "/canary", {"version": 1, "weight": 0.5}),
    ("POST", "/shadow", {"version": 1, "weight": 0.5}),
    ("POST", "/pin", {"version": 1}),
    ("DELETE", "/pin", None),
]


@pytest.mark.parametrize(("method", "path", "body"), TRAFFIC)
async def test_traffic_is_shared_out_by_the_owner_and_the_operator(
    operator, acme, globex, issue, secret, config, method, path, body
):
    asks = await issue("acme", "inference")
    for client, name, status in (
        (acme, "secret", 200), (acme, "acme/secret", 200), (operator, "acme/secret", 200), (operator, "secret", 404),
        (globex, "secret", 404), (globex, "acme/secret", 404), (asks, "secret", 403),
    ):  # fmt: skip
        done = await client.request(method, f"/v1/adapters/{name}{path}", json=body)
        assert done.status_code == status, f"{client.headers} {name}"
    lines = [json.loads(line) for line in (config.data_dir / "audit.jsonl").read_text().splitlines()][-7:]
    subject = "acme/secret@v1" if body else "acme/secret"
    assert [row["subject"] for row in lines[:3]] == [subject] * 3
    assert [(row["tenant"], row["outcome"]) for row in lines[:3]] == [
        ("acme", "done"), ("acme", "done"), ("default", "done")
    ]  # fmt: skip


async def test_an_adapter_that_is_called_as_its_route_is_told_apart(operator, acme, issue, make_adapter):
    for name in ("canary", "shadow", "promote", "versions"):
        assert (await acme.post("/v1/adapters", **upload(make_adapter(), name=name))).status_code == 201
        assert (await acme.post(f"/v1/adapters/{name}/pin")).status_code == 200
        assert (await operator.delete(f"/v1/adapters/acme/{name}")).json()["deleted"] == [1]
    refused = await acme.post("/v1/adapters", **upload(make_adapter(), name="pin"))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "name"


async def test_a_shared_adapters_canary_answers_other_tenants_askers_too(acme, globex, operator, make_adapter):
    live, candidate = [
        (await acme.post("/v1/adapters", **upload(make_adapter(seed), promote=promote, visibility="shared"))).json()[
            "id"
        ]
        for seed, promote in ((0, "true"), (1, "false"))
    ]
    await acme.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
    users = [f"u{number}" for number in range(40)]
    answers = [
        [(await ask(client, name, user=user)).json()["model"] for user in users]
        for client, name in ((acme, "tone"), (acme, "acme/tone"), (globex, "acme/tone"))
    ]
    assert set(answers[0]) == set(answers[2]) == {live, candidate}
    assert answers[0] == answers[1] != answers[2], "two tenants' users of one name are one asker"
    text = (await operator.get("/metrics")).text
    assert 'loradock_requests_total{adapter="acme/tone",code="200",finish_reason="stop",version="v2"}' in text


async def test_a_shadow_stays_in_its_tenant_and_is_on_nobodys_key(operator, issue, backend, config, make_adapter):
    owner = await issue("acme", name="anna")
    for seed in (0, 1):
        await owner.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
    await owner.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
    limited = await issue("acme", "inference", concurrent=1, requests_per_minute=1000, tokens_per_minute=100_000)
    backend.usage = {"total_tokens": 10_000, "prompt_tokens": 10_000}
    audited = (config.data_dir / "audit.jsonl").read_text()
    for path, fields in (("/v1/chat/completions", {"cache_salt": "mine"}), ("/v1/responses", {"input": "x"})):
        backend.bodies.clear()
        assert (await limited.post(path, json={"model": "tone", **fields})).status_code == 200
        assert await settled(lambda: len(backend.bodies) == 2)
        real, unseen = backend.bodies
        assert real["cache_salt"] == unseen["cache_salt"] and real["cache_salt"].split(":")[0] == "acme"
        assert unseen["model"].startswith("acme/tone@") and unseen["model"] != real["model"]
        assert "request_id" not in unseen, "two answers under one id"
    told = await ask(limited, "base")
    # What is left before this one: the two real ones are paid, and no shadow.
    assert int(told.headers["x-ratelimit-remaining-tokens"]) >= 80_000
    assert int(told.headers["x-ratelimit-remaining-requests"]) >= 997

    backend.slow = unseen["model"]
    for _ in range(3):
        assert (await ask(limited, "tone")).status_code == 200, "a shadow under way counts as one of the key's"
    assert (config.data_dir / "audit.jsonl").read_text() == audited
    answered = 'loradock_shadow_requests_total{adapter="acme/tone",result="answered",version="v2"} 2.0'

    async def counted():
        return answered in (await operator.get("/metrics")).text

    assert await settled(counted)


async def test_scopes_open_what_they_say_and_no_more(issue, make_adapter):
    asks, writes = await issue("acme", "inference"), await issue("acme", "adapters:write")
    assert (await writes.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
    assert (await asks.post("/v1/adapters", **upload(make_adapter()))).status_code == 403
    assert (await asks.get("/v1/adapters")).status_code == 403
    assert (await ask(asks, "tone")).status_code == 200
    assert (await ask(writes, "tone")).status_code == 403
    for path in ("/v1/keys", "/v1/engines", "/metrics"):
        assert (await writes.get(path)).status_code == (await asks.get(path)).status_code == 403


async def test_the_same_weights_with_other_tokens_or_settings_are_another_adapter_to_the_engine(issue, make_adapter):
    """The prefix cache is keyed by its name: blocks of prompts that were encoded otherwise are never another's."""
    acme, globex = await issue("acme"), await issue("globex")
    asked = ((acme, "", 4), (acme, "<call>", 4), (acme, "<other>", 4), (acme, "<call>", 8), (globex, "<call>", 4))
    ids = []
    for client, token, alpha in asked:
        folder = make_adapter(0)
        settings = json.loads((folder / CONFIG).read_text()) | {"lora_alpha": alpha}
        (folder / CONFIG).write_text(json.dumps(settings))
        added = [{"id": 20, "content": token, "special": True}] if token else []
        (folder / TOKENIZER).write_text(json.dumps({"added_tokens": added}))
        pushed = await client.post("/v1/adapters", **upload(folder))
        assert pushed.status_code == 201, pushed.text
        ids.append((await ask(client, "tone")).json()["model"])
    assert len(set(ids)) == len(asked)


async def test_a_cache_salt_reaches_the_engine_inside_its_tenant_only(operator, acme, backend):
    await ask(operator, "base")
    assert "cache_salt" not in backend.bodies[-1], "tenant default shares one prefix cache"
    await ask(acme, "base")
    assert backend.bodies[-1]["cache_salt"] == "acme"
    salts = set()
    for client, salt in itertools.product((operator, acme), ("mine", "acme", "acme:x", "tone@0123456789ab")):
        await ask(client, "base", cache_salt=salt)
        salts.add(backend.bodies[-1]["cache_salt"])
    assert len(salts) == 8 and "acme" not in salts
    # What vLLM itself refuses, it gets to refuse.
    for salt in ("", 3):
        await ask(acme, "base", cache_salt=salt)
        assert backend.bodies[-1]["cache_salt"] == salt
    await acme.post("/tokenize", json={"model": "base", "prompt": "x"})
    assert "cache_salt" not in backend.bodies[-1]


def test_no_salt_is_an_adapters_namespace_and_vllm_takes_them_all():
    for tenant, salt in itertools.product(
        ("default", "a" * 64), ("x", "tone@0123456789ab", "a/b@v1", "\ud800", "ä" * 5000)
    ):
        made = tenant_salt(salt, tenant)
        assert made is not None and made.startswith(f"{tenant}:")
        assert len(made) <= 128 and not set(made) & set("@/\\\x00")


async def test_a_stored_response_answers_its_own_tenant_alone(operator, acme, globex, backend):
    await acme.post("/v1/responses", json={"model": "base", "input": "x", "request_id": "resp_guessed"})
    mine = backend.bodies[-1]["request_id"]
    assert STORED.fullmatch(f"/v1/responses/{mine}")
    made_up = mine[:-32] + "0" * 32
    assert (await acme.get(f"/v1/responses/{mine}")).status_code == 200
    for other in (globex, operator):
        for method, path in (("GET", "/v1/responses/{}"), ("POST", "/v1/responses/{}/cancel")):
            answers = [seen(await other.request(method, path.format(id)), id) for id in (mine, made_up)]
            assert answers[0] == answers[1] and answers[0][0] == 404
        follow = await other.post("/v1/responses", json={"model": "base", "previous_response_id": mine})
        assert follow.status_code == 404
    assert (await acme.get("/v1/responses/resp_guessed")).status_code == 404
    assert (await acme.post("/v1/responses", json={"model": "base", "previous_response_id": mine})).status_code == 200


async def test_no_tenant_writes_over_another_ones_stored_response(operator, acme, globex, backend):
    await acme.post("/v1/responses", json={"model": "base", "input": "x"})
    theirs = backend.bodies[-1]["request_id"]
    for other in (operator, globex):
        await other.post("/v1/responses", json={"model": "base", "input": "y", "request_id": theirs})
        own = backend.bodies[-1]["request_id"]
        assert own != theirs
        assert (await other.get(f"/v1/responses/{own}")).status_code == 200


async def test_a_drift_report_quotes_its_own_tenants_answers_alone(connect, watched, backend, make_adapter):
    generate = Engine(backend).generate
    backend.generate = lambda body: replace(generate(body), text=f"for {body.get('user')}")
    config = replace(watched, capture=True, admin_keys=keys_hashed(["run"]))
    async with connect(config) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme, globex = [await issued(operator, tenant) for tenant in ("acme", "globex")]
        assert (await acme.post("/v1/adapters", **upload(make_adapter(), visibility="shared"))).status_code == 201
        # The first 64 requests are left out: they only teach what repeats.
        for number in range(60):
            for client, user in ((acme, "acme"), (globex, "globex")):
                await ask(client, "acme/tone", user=f"{user} {number}")
        await asyncio.to_thread(operator._transport.app.state.parts.exchange_worker.settle)
        for reader, path in ((acme, "tone"), (operator, "acme/tone")):
            report = (await reader.get(f"/v1/adapters/{path}/drift")).json()["versions"][0]
            assert {quote["answer"].split()[1] for quote in report["examples"]} == {"acme"}


async def test_an_adapter_is_shared_and_kept_back_without_another_push(acme, globex, make_adapter):
    await acme.post("/v1/adapters", **upload(make_adapter(), name="tone"))
    assert (await globex.post("/v1/chat/completions", json={"model": "acme/tone"})).status_code == 404
    shared = await acme.post("/v1/adapters/tone/visibility", json={"visibility": "shared", "why": "the demo"})
    assert (shared.status_code, shared.json()["visibility"]) == (200, "shared")
    assert (await globex.post("/v1/chat/completions", json={"model": "acme/tone"})).status_code == 200
    private = await acme.post("/v1/adapters/tone/visibility", json={"visibility": "private"})
    assert private.json()["visibility"] == "private"
    assert (await globex.post("/v1/chat/completions", json={"model": "acme/tone"})).status_code == 404
    history = (await acme.get("/v1/adapters/tone")).json()["history"]
    assert [row["what"] for row in history][-2:] == ["share", "unshare"]
