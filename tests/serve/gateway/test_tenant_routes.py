"""Files, jobs, data, loops and what is left of them: no route shows one tenant what is another's, or lets it change it.

Every route of the app is walked with real ids and with made-up ones; a route with an id of a new kind fails here until
it is known. What is found by an adapter's name alone is walked in tests/serve/gateway/test_tenants.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, replace

import httpx
import pytest

from serve.config import keys_hashed
from serve.loop.likelihood import Example
from serve.rollout.policy import parse
from tests.serve.api.test_data import asked
from tests.serve.gateway.test_tenants import BODIES, seen
from tests.serve.jobs.batches.conftest import request
from tests.serve.jobs.batches.test_batches import begun as batch_begun
from tests.serve.jobs.batches.test_batches import ended as batch_ended
from tests.serve.jobs.finetuning.conftest import begun, ended, examples, sent
from tests.serve.loop.conftest import QUICK
from tests.support.app import issued, upload
from tests.support.trainer import COMMAND
from tests.support.waiting import settled

POLICIES = parse({"*": {"train_on_traffic": True, "loop": QUICK}})
WORDS = "what acme alone asks"
# What an id of a route can be, by how the route begins.
IDS = {
    "/v1/files/": ("training", "results", "output", "built"),
    "/v1/batches/": ("batch",),
    "/v1/fine_tuning/jobs/": ("ended", "paused"),
    "/v1/fine_tuning/work/": ("ended", "paused"),
    "/v1/adapters/{name}/data/conversations/": ("conversation", "request"),
    "/v1/adapters/{name}/loop/references/": ("reference",),
    "/v1/keys/": ("key",),
}
# What in bodies and queries is an id, with what it can be.
ASKED = {
    "training_file": ("training", "built"),
    "validation_file": ("training",),
    "input_file_id": ("input",),
    "request_id": ("request",),
    "after": ("training", "batch", "ended", "event", "checkpoint"),
    "lora_int_id": (),  # a number that vLLM's clients make up
}


@dataclass
class World:
    """What acme has, by its kind; whoever else asks is a tenant of this server too."""

    operator: httpx.AsyncClient
    acme: httpx.AsyncClient
    globex: httpx.AsyncClient
    ids: dict[str, str]

    @property
    def paths(self):
        return self.operator._transport.app.openapi()["paths"]


@pytest.fixture
async def world(connect, config, sdk, backend, make_adapter, monkeypatch):
    monkeypatch.setenv("STAND_IN", "{}")
    backend.generate = lambda fields: replace(backend.generation, text="an answer")
    server = connect(replace(config, admin_keys=keys_hashed(["run"]), policies=POLICIES))
    process = server.app.state.parts.fine_tuning.runner.process
    process.command, process.nice = COMMAND, 0
    async with server as client:
        client.headers["authorization"] = "Bearer run"
        acme, globex = await issued(client, "acme", name="anna"), await issued(client, "globex", name="gus")
        for tenant, name in ((acme, "secret"), (globex, "mine")):
            assert (await tenant.post("/v1/adapters", **upload(make_adapter(), name=name))).status_code == 201
        yield World(client, acme, globex, await owned_by(acme, sdk(acme), client, server.app.state.parts))


async def owned_by(acme, ai, operator, parts):
    """Something of every kind that a route has an id for."""
    ids = {"training": await sent(ai)}
    ids["request"] = await asked(acme, WORDS, model="secret", rating=1)
    await settled(lambda: parts.captures.worker._done >= parts.captures.worker._offered)
    ((conversation),) = (await acme.get("/v1/adapters/secret/data/conversations")).json()["data"]
    ids["conversation"] = conversation["id"]
    ids["built"] = (await acme.post("/v1/adapters/secret/data", json={"held_out": 0})).json()["training_file"]
    job = await ended(ai, await begun(ai, training_file=ids["training"], suffix="secret"))
    assert job.status == "succeeded", job.error
    ids |= {"ended": job.id, "results": job.result_files[0]}
    ids["event"] = (await ai.fine_tuning.jobs.list_events(job.id)).data[0].id
    ids["checkpoint"] = (await ai.fine_tuning.jobs.checkpoints.list(job.id)).data[0].id
    ids["paused"] = await begun(ai, examples(30), suffix="secret")
    await ai.fine_tuning.jobs.pause(ids["paused"])
    batch = await batch_ended(ai, await batch_begun(ai, request("q")))
    ids |= {"batch": batch.id, "input": batch.input_file_id, "output": batch.output_file_id}
    rows = parts.loops.rows
    loop = await asyncio.to_thread(rows.made, "acme/secret")
    held_out = Example({"prompt": WORDS, "completion": "yes"})
    ids["reference"] = await asyncio.to_thread(rows.references.hold_out, loop, [held_out], "v1")
    await asyncio.to_thread(rows.made, "globex/mine")
    (key,) = [key for key in (await operator.get("/v1/keys")).json()["data"] if key["tenant"] == "acme"]
    return {**ids, "key": key["id"]}


def made_up(id: str) -> str:
    """An id of the same form that nobody has."""
    parts = re.split(r"([-_])", id)
    parts[-1 if len(parts) < 5 else -3] = parts[-1 if len(parts) < 5 else -3][::-1]
    assert "".join(parts) != id
    return "".join(parts)


def with_ids(paths):
    """(method, path, the kinds that its id can be), of every route that has one."""
    for path, methods in paths.items():
        if "{id}" in path:
            (beginning,) = [beginning for beginning in IDS if path.startswith(beginning)]  # a new kind is added there
            for method in methods:
                yield method, path, IDS[beginning]


def url(path: str, id: str, name: str) -> str:
    return path.format(id=id, name=name, number=1, file="training.jsonl")


async def shown_to_its_owner(world) -> dict[str, str]:
    """What acme reads of all that it has."""
    told = {}
    for method, path, kinds in with_ids(world.paths):
        if method == "get" and "/work/" not in path:
            for kind in kinds:
                answer = await world.acme.get(url(path, world.ids[kind], "secret"))
                assert answer.status_code == 200, f"{path} with {kind}: {answer.text}"
                told[f"{path} {kind}"] = answer.text
    for path in ("/v1/adapters/secret/data/conversations", "/v1/files", "/v1/batches", "/v1/fine_tuning/jobs"):
        told[path] = (await world.acme.get(path)).text
    told["references"] = (await world.acme.get("/v1/adapters/secret/loop")).json()["references"]
    told["keys"] = (await world.operator.get("/v1/keys?tenant=acme")).text
    return told


async def test_no_route_tells_another_tenants_ids_from_made_up_ones(world):
    before = await shown_to_its_owner(world)
    for method, path, kinds in with_ids(world.paths):
        (security, *_) = world.paths[path][method]["security"]
        status = 404 if security["bearer"][0] in ("inference", "adapters:write") else 403
        for kind in kinds:
            for name in ("acme/secret", "secret", "mine"):
                answers = []
                for id in (world.ids[kind], made_up(world.ids[kind])):
                    answer = await world.globex.request(method, url(path, id, name), **BODIES.get((method, path), {}))
                    assert answer.status_code == status, f"{method} {path} with {kind}: {answer.text}"
                    answers.append(seen(answer, id))
                assert answers[0] == answers[1], f"{method} {path} with {kind}"
    assert await shown_to_its_owner(world) == before


async def test_files_batches_and_jobs_are_their_tenants_alone_also_for_operators(world):
    before, walked = await shown_to_its_owner(world), 0
    for method, path, kinds in with_ids(world.paths):
        if path.startswith(("/v1/files/", "/v1/batches/", "/v1/fine_tuning/jobs/")):
            for kind in kinds:
                answers = []
                for id in (world.ids[kind], made_up(world.ids[kind])):
                    answer = await world.operator.request(method, url(path, id, "secret"))
                    answers.append(seen(answer, id))
                assert answers[0] == answers[1] and answers[0][0] == 404, f"{method} {path} with {kind}"
                walked += 1
    assert walked > 20
    assert await shown_to_its_owner(world) == before


async def test_no_body_or_query_takes_another_tenants_id(world):
    before, walked = await shown_to_its_owner(world), set()
    for path, methods in world.paths.items():
        for method, operation in methods.items():
            for field, where in fields_of(world, operation):
                for kind in ASKED[field]:  # a new field is added there
                    answers = []
                    for id in (world.ids[kind], made_up(world.ids[kind])):
                        answers.append(await given(world.globex, method, path, field, id, where))
                    assert answers[0] == answers[1], f"{field} of {method} {path} with {kind}"
                    # A list by name goes on after any name, of which nobody learns anything.
                    taken = (400, 404, 200) if (path, field) == ("/v1/adapters", "after") else (400, 404)
                    assert answers[0][0] in taken, f"{field} of {method} {path}: {answers[0]}"
                walked.add((path, field))
    assert {
        ("/v1/fine_tuning/jobs", "training_file"),
        ("/v1/batches", "input_file_id"),
        ("/v1/files", "after"),
    } < walked
    assert await shown_to_its_owner(world) == before


def fields_of(world, operation):
    """(name, where it is) of what an operation takes that names a file, a job, a request or a page."""
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "query" and is_id(parameter["name"]):
            yield parameter["name"], "query"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    schemas = world.operator._transport.app.openapi()["components"]["schemas"]
    for name in schemas.get(reference, {}).get("properties", {}):
        if is_id(name):
            yield name, "body"


def is_id(name: str) -> bool:
    return name in ("id", "after") or name.endswith(("_file", "_id"))


async def given(client, method, path, field, id, where):
    """What comes of a request that is in order but for this id."""
    bodies = {
        "/v1/fine_tuning/jobs": {"model": "base", "suffix": "mine"},
        "/v1/batches": {"endpoint": "/v1/chat/completions", "completion_window": "24h"},
        "/v1/feedback": {"rating": 1},
    }
    body = bodies.get(path, {})
    if field == "validation_file":
        sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("own.jsonl", examples())}}
        body = {**body, "training_file": (await client.post("/v1/files", **sent)).json()["id"]}
    if where == "query":
        answer = await client.request(method, url(path, "ftjob-none", "mine"), params={field: id})
    else:
        answer = await client.request(method, path, json={**body, field: id})
    return seen(answer, id)


async def test_no_list_of_one_tenant_holds_anything_of_another(world):
    told = {}
    for path, methods in world.paths.items():
        if "get" in methods and "{" not in path:
            told[path] = (await world.globex.get(path)).text
    told["/v1/adapters/mine/loop"] = (await world.globex.get("/v1/adapters/mine/loop")).text
    told["/v1/adapters/mine/data/conversations"] = (await world.globex.get("/v1/adapters/mine/data/conversations")).text
    assert {"/v1/files", "/v1/loops", "/v1/fine_tuning/jobs", "/v1/overview/changes", "/v1/usage"} < told.keys()
    for path, text in told.items():
        for what, secret in {**world.ids, "name": "acme", "adapter": "secret", "words": WORDS, "key": "anna"}.items():
            assert secret not in text, f"{path} tells the {what}"
    assert json.loads(told["/v1/files"])["data"] == json.loads(told["/v1/fine_tuning/jobs"])["data"] == []
