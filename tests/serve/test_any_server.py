"""Two servers over one registry, without homes: what concerns an answer of one of them is taken by the other too."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from serve.config import keys_hashed
from serve.errors import EngineUnavailable
from serve.rollout.policy import parse
from tests.support.app import ask, issued, upload
from tests.support.backend import FakeBackend
from tests.support.postgres import database
from tests.support.waiting import settled


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("serve.fleet.heartbeat.BEAT_SECONDS", 0.05)
    monkeypatch.setattr("serve.rollout.registry_sync.POLL_SECONDS", 0.05)
    # However slow the machine is, nobody is gone by chance, and everybody is waited for.
    monkeypatch.setattr("serve.fleet.heartbeat.MISSED", 1_000_000)
    monkeypatch.setattr("serve.fleet.server_messages.WAIT_SECONDS", 60.0)


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    return database(request.getfixturevalue("postgres"))


def parts(client):
    return client._transport.app.state.parts


@pytest.fixture
async def pair(connect, watched, tmp_path, registry, make_adapter):
    """Clients of two servers with an adapter, which learns from its traffic."""
    policies = parse({"*": {"train_on_traffic": True, "verdicts": {"ratings_per_key": 1000}}})
    both = replace(
        watched,
        registry=registry,
        blobs=f"file://{tmp_path}/shared",
        admin_keys=keys_hashed(["run"]),
        policies=policies,
    )
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(2):
            backend = FakeBackend(watched.model)
            backend.generate = lambda fields, plain=backend.generation: replace(
                plain, text=f"answer to {fields['messages'][-1]['content']}"
            )
            own = replace(both, data_dir=tmp_path / f"data-{number}")
            clients.append(await stack.enter_async_context(connect(own, backend)))
            clients[-1].headers["authorization"] = "Bearer run"
        (await clients[0].post("/v1/adapters", **upload(make_adapter()))).raise_for_status()
        for client in clients:
            assert await settled(lambda client=client: len(parts(client).heartbeat.living()) == 2)
        yield clients


async def answered(client, *said, user="me"):
    """A conversation, of which each request repeats what was said; the ids of its answers."""
    messages, ids = [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        answer = await ask(client, "tone", messages=messages, user=user)
        assert answer.status_code == 200, answer.text
        ids.append(answer.headers["x-request-id"])
        messages.append({"role": "assistant", "content": f"answer to {text}"})
    return ids


async def kept(client):
    captures = parts(client).captures
    await asyncio.to_thread(captures.worker.settle)
    return await asyncio.to_thread(lambda: list(captures.conversations.rows("default", ["tone"])))


async def good(client):
    """How many good ratings a server has counted, as it shows once a second."""
    lines = (await client.get("/metrics")).text.splitlines()
    counts = [line for line in lines if line.startswith("loradock_feedback_total{") and 'rating="good"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counts if '"tone"' in line)


async def rate(client, id, **said):
    return await client.post("/v1/feedback", json={"request_id": id, **(said or {"rating": 1.0})})


async def test_feedback_is_taken_by_any_server_and_counts_once_where_the_answer_came_from(pair):
    for told in (1, 0):
        (id,) = await answered(pair[0], "who are you?")
        answer = await rate(pair[told], id)
        assert (answer.status_code, answer.json().get("rating")) == (200, 1.0), answer.text
        for client in pair:
            assert (await rate(client, id)).status_code == 404
    assert [await good(client) for client in pair] == [2, 0]
    assert [row.rating for row in await kept(pair[0])] == [1.0, 1.0]
    unknown = await rate(pair[1], "0" * 32)
    assert unknown.status_code == 404


async def test_a_correction_sent_to_another_server_is_what_is_learned(pair):
    one, other = pair
    (id,) = await answered(one, "who are you?")
    assert (await rate(other, f"chatcmpl-{id}", answer="a parrot")).status_code == 200
    assert [row.correction for row in await kept(one)] == ["a parrot"]
    # Captured requests are kept for longer than those that a rating is counted for.
    (id,) = await answered(one, "and where?")
    await kept(one)
    parts(one)._feedback._recent.clear()
    assert (await rate(other, id, answer="here")).status_code == 200
    assert {row.correction for row in await kept(one)} == {"a parrot", "here"}


async def test_a_client_s_own_id_means_an_answer_of_its_own_key_on_any_server(pair):
    one, other = pair
    mine = await issued(one, "default", "inference", name="mine")
    fields = {"model": "tone", "messages": [{"role": "user", "content": "who are you?"}]}
    for headers in (mine.headers, one.headers):
        headers = {**headers, "x-request-id": "the-same"}
        assert (await one.post("/v1/chat/completions", json=fields, headers=headers)).is_success
    body = {"request_id": "the-same", "rating": 0.0}
    assert (await other.post("/v1/feedback", json=body, headers=mine.headers)).status_code == 200
    assert [row.rating for row in await kept(one)].count(0.0) == 1
    assert await asyncio.to_thread(parts(other).messages.pending) == 0, "what was said stays in the registry"


async def test_a_stranger_rates_nothing_through_another_server(pair):
    one, other = pair
    (id,) = await answered(one, "who are you?")
    stranger = await issued(one, "acme", "inference")
    assert (
        await other.post("/v1/feedback", json={"request_id": id, "rating": 0}, headers=stranger.headers)
    ).status_code == 404
    assert (await rate(other, id)).status_code == 200


async def test_bad_ratings_that_another_server_was_sent_end_a_canary_on_all(pair, make_adapter):
    one, other = pair
    second = await one.post("/v1/adapters", **upload(make_adapter(1), promote="false"))
    canary = await one.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
    assert canary.status_code == 200, canary.text

    async def rated(number):
        message = {"role": "user", "content": "who are you?"}
        answer = await ask(one, "tone", messages=[message], user=f"u{number}")
        rating = 0.1 if answer.json()["model"] == second.json()["id"] else 0.9
        assert (await rate(other, answer.headers["x-request-id"], rating=rating)).status_code == 200

    async def ended():
        return (await other.get("/v1/adapters/tone")).json()["canary"] is None

    for batch in range(15):
        await asyncio.gather(*(rated(number) for number in range(20 * batch, 20 * batch + 20)))
        await asyncio.to_thread(parts(one).exchange_worker.settle)
        if await ended():
            break
    assert await settled(ended)
    last = (await other.get("/v1/adapters/tone")).json()["history"][-1]
    assert last["who"] == "wayback" and "rating" in last["why"]


async def test_a_conversation_is_deleted_through_any_server(pair):
    one, other = pair
    ids = await answered(one, "who are you?", "and where?")
    strangers = await answered(one, "who are you?", user="somebody else")
    path = "/v1/adapters/tone/data/conversations"
    assert {row.id for row in await kept(one)} == {*ids, *strangers}
    gone = await other.delete(f"{path}/{ids[0]}")
    assert gone.status_code == 200 and gone.json()["requests"] == 2, gone.text
    assert [row.id for row in await kept(one)] == strangers
    assert (await other.delete(f"{path}/{ids[0]}")).status_code == 404
    assert (await one.delete(f"{path}/nobody")).status_code == 404


async def test_while_the_registry_does_not_answer_nobody_says_that_there_is_no_such_answer(pair, monkeypatch):
    one, other = pair
    (id,) = await answered(one, "who are you?")

    def gone(*_, **__):
        raise EngineUnavailable("the registry is gone")

    with monkeypatch.context() as patch:
        patch.setattr(parts(other).registry, "adding", gone)
        assert (await rate(other, id)).status_code == 503
    assert (await rate(other, id)).status_code == 200


async def test_a_server_that_has_not_looked_is_waited_for_and_then_it_is_no_404(pair, monkeypatch):
    one, other = pair
    (id,) = await answered(one, "who are you?")

    async def hangs(*_):
        await asyncio.sleep(3600)

    with monkeypatch.context() as patch:
        patch.setattr("serve.fleet.server_messages.WAIT_SECONDS", 0.5)
        patch.setattr(parts(one).messages, "_read_new", hangs)
        answer = await rate(other, id)
        assert answer.status_code == 503 and "retry" in answer.json()["error"]["message"]
