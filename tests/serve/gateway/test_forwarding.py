"""Two servers on sockets, on one registry: a request is answered at its adapter's home, whichever server it came to."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import insert, update

from serve.adapters.registry.tables import replicas
from serve.auth.shared_limits import SharedLimits
from serve.config import keys_hashed
from serve.errors import EngineUnavailable
from serve.fleet.homes import Replica, Replicas, order
from serve.gateway.forwarding import MARK
from serve.rollout.policy import parse
from serve.server.assembly import build_app
from tests.support.app import CHAT, ask, ready, upload
from tests.support.backend import FakeBackend
from tests.support.listening import uvicorn_server
from tests.support.postgres import database
from tests.support.waiting import settled

NAMES = [f"tone-{number}" for number in range(6)]
SERVERS = ("one", "other")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("serve.fleet.heartbeat.BEAT_SECONDS", 0.02)
    # However slow the machine is, nobody is gone by chance.
    monkeypatch.setattr("serve.fleet.heartbeat.MISSED", 1_000_000)


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    return database(request.getfixturevalue("postgres"))


class Serving:
    """A server on a socket of its own, and a client of it."""

    def __init__(self, config, backend, replica):
        self.backend = backend
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.app = build_app(replace(config, fleet_address=self.url), backend, replica=replica)
        options = {"access_log": False, "timeout_graceful_shutdown": 30}
        self._server = uvicorn_server(self.app, **options)
        self._server.capture_signals = suppress
        self.membership = self.app.state.parts.membership
        self.heartbeat = self.app.state.parts.heartbeat

    async def __aenter__(self):
        self._running = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        self.client = httpx.AsyncClient(base_url=self.url, headers={"authorization": "Bearer run"}, timeout=60)
        await ready(self.app)
        assert await settled(lambda: self._server.started)
        return self

    async def __aexit__(self, *_):
        await self.client.aclose()
        await self.stop()

    async def stop(self):
        self._server.should_exit = True
        await self._running


@asynccontextmanager
async def serving(config, tiny_model, tmp_path, registry, **fields):
    common = replace(
        config, registry=registry, blobs=f"file://{tmp_path}/shared", admin_keys=keys_hashed(["run"]), **fields
    )
    async with AsyncExitStack() as stack:
        servers = []
        for replica in SERVERS:
            own = replace(common, data_dir=tmp_path / replica)
            one = Serving(own, FakeBackend(str(tiny_model)), replica)
            servers.append(await stack.enter_async_context(one))
        yield servers


@pytest.fixture
async def pair(config, tiny_model, tmp_path, registry):
    async with serving(config, tiny_model, tmp_path, registry) as servers:
        assert await settled(lambda: all(len(server.membership.peers) == 1 for server in servers))
        yield servers


@pytest.fixture
def registry_of_one(tmp_path):
    return f"sqlite:///{tmp_path}/registry.db"


@pytest.fixture
async def two(config, tiny_model, tmp_path, registry_of_one):
    """As `pair`, over SQLite alone."""
    async with serving(config, tiny_model, tmp_path, registry_of_one) as servers:
        assert await settled(lambda: all(len(server.membership.peers) == 1 for server in servers))
        yield servers


def home_of(name, ids=SERVERS):
    """Whose the name is, by the same hash."""
    replicas = Replicas.of(Replica(id, FakeBackend.max_resident, FakeBackend.max_lora_rank) for id in ids)
    return SERVERS.index(replicas.members[order(replicas, name)[0]].id)


AWAY = next(name for name in NAMES if home_of(name) == 1)
HERE = next(name for name in NAMES if home_of(name) == 0)


async def push(server, make_adapter, *names):
    for name in names:
        pushed = await server.client.post("/v1/adapters", **upload(make_adapter(), name=name))
        assert pushed.status_code == 201, pushed.text


def asked_here(server):
    """The requests that a server's engine got for adapters, without probes."""
    return [body for body in server.backend.bodies if "tone" in str(body.get("model"))]


async def test_every_name_is_answered_at_its_home_whoever_is_asked(pair, make_adapter):
    await push(pair[0], make_adapter, *NAMES)
    for name in NAMES:
        for server in (*pair, *pair):
            answer = await ask(server.client, name)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"].startswith(f"{name}@")
            assert answer.headers["x-loradock-version"] == f"{name}@v1"
            assert len(answer.headers.get_list("x-request-id")) == 1
    for place, server in enumerate(pair):
        homes = [body["model"].partition("@")[0] for body in asked_here(server)]
        assert homes == [name for name in NAMES if home_of(name) == place for _ in range(4)]
        # The base has no home.
        assert (await ask(server.client, "base")).status_code == 200
        assert server.backend.bodies[-1]["model"] == "base"


async def test_an_answer_streams_through_and_its_client_s_leave_too(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY)
    other.backend.flow.clear()
    async with one.client.stream("POST", CHAT, json={"model": AWAY, "messages": [], "stream": True}) as answer:
        lines = answer.aiter_lines()
        assert AWAY in await anext(lines)  # the rest is not there yet
        assert other.backend.running == 1 and not asked_here(one)
    assert await settled(lambda: other.backend.running == 0)
    other.backend.flow.set()
    answer = await ask(one.client, AWAY, stream=True)
    assert answer.text.rstrip().endswith("data: [DONE]")


async def test_a_client_that_leaves_before_an_answer_leaves_the_home_too(two, make_adapter, monkeypatch):
    one, other = two
    queue, loaded = other.app.state.parts.fleet.first.engine.queue, asyncio.Event()

    async def load(*_):
        await loaded.wait()

    monkeypatch.setattr(other.backend, "add", load)
    await push(one, make_adapter, AWAY)
    asking = asyncio.create_task(ask(one.client, AWAY))
    assert await settled(lambda: queue.busy == 1)
    asking.cancel()
    assert await settled(lambda: queue.busy == 0)
    assert not asked_here(one)
    loaded.set()


async def test_the_home_judges_the_client_s_own_key_and_charges_it_once(two, make_adapter, monkeypatch):
    one, other = two
    # What they tell one another of keys, a beat later, is left out.
    monkeypatch.setattr(SharedLimits, "hear", lambda self, others: None)
    await push(one, make_adapter, AWAY)
    key = {"tenant": "default", "name": "few", "scopes": ["inference"], "limits": {"requests_per_minute": 3}}
    limited = await one.client.post("/v1/keys", json=key)
    assert limited.status_code == 201, limited.text
    bearer = {"authorization": f"Bearer {limited.json()['secret']}"}
    statuses = [
        (await one.client.post(CHAT, json={"model": AWAY, "messages": []}, headers=bearer)).status_code
        for _ in range(4)
    ]
    assert statuses == [200, 200, 200, 429]
    assert len(asked_here(other)) == 3 and not asked_here(one)
    # What was charged there was not charged here.
    assert (await one.client.post(CHAT, json={"model": "base", "messages": []}, headers=bearer)).status_code == 200
    wrong = await one.client.post(CHAT, json={"model": AWAY, "messages": []}, headers={"authorization": "Bearer no"})
    assert wrong.status_code == 401
    assert len(asked_here(other)) == 3


async def test_a_request_is_sent_on_once(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY)
    marked = {MARK.decode(): "somebody"}
    assert (await one.client.post(CHAT, json={"model": AWAY, "messages": []}, headers=marked)).status_code == 200
    assert len(asked_here(one)) == 1 and not asked_here(other)


async def test_an_error_of_the_home_s_engine_is_the_answer(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY)
    answer = await one.client.post(CHAT, json={"model": f"{AWAY}@v7", "messages": []})
    assert answer.status_code == 404
    answer = await one.client.post(CHAT, json={"model": AWAY, "messages": [], "priority": -5})
    assert answer.status_code == 400
    # Too large a body goes no further than the server that it came to.
    answer = await one.client.post(CHAT, json={"model": AWAY, "messages": [], "user": "x" * (5 << 20)})
    assert answer.status_code == 413
    assert not asked_here(other)


async def test_a_deadline_ends_it_at_the_home_too(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY)
    other.backend.slow = (await one.client.get(f"/v1/adapters/{AWAY}")).json()["versions"][0]["id"]
    answer = await one.client.post(CHAT, json={"model": AWAY, "messages": []}, headers={"x-request-timeout": "1"})
    assert answer.status_code == 504
    engine = other.app.state.parts.fleet.first
    assert await settled(lambda: engine.leases == 0)


async def test_a_home_that_has_stopped_costs_no_request(two, make_adapter):
    one, other = two
    await push(one, make_adapter, *NAMES)
    assert (await ask(one.client, AWAY)).status_code == 200
    before = len(asked_here(other))
    stopping = asyncio.create_task(other.stop())
    for _ in range(20):
        for name in NAMES:
            assert (await ask(one.client, name)).status_code == 200
    await stopping
    assert await settled(lambda: not one.membership.peers), "a server that stopped is still in the fleet"
    assert len(asked_here(one)) + len(asked_here(other)) - before == 20 * len(NAMES)


async def test_a_home_that_cannot_be_reached_is_told_of_once(two, make_adapter, caplog, monkeypatch):
    one, other = two
    await push(one, make_adapter, AWAY)
    (peer,) = one.membership.peers
    nobody = "http://127.0.0.1:9"
    there = other.membership.address
    other.membership.address = nobody
    assert await settled(lambda: peer.address == nobody)
    for _ in range(3):
        assert (await ask(one.client, AWAY)).status_code == 200
    assert len(asked_here(one)) == 3 and not asked_here(other)
    assert caplog.text.count("takes no requests that are sent on") == 1
    other.membership.address = there
    assert await settled(lambda: peer.address == there)
    monkeypatch.setattr(one.membership, "_clock", lambda: peer.unreachable_until + 1)
    assert (await ask(one.client, AWAY)).status_code == 200
    assert len(asked_here(other)) == 1
    assert await settled(lambda: not peer.unreachable_until)


async def test_a_home_without_room_leaves_the_request_to_whoever_got_it(two, make_adapter, monkeypatch):
    from serve.errors import Overloaded

    one, other = two
    await push(one, make_adapter, AWAY)
    admission = other.app.state.parts.fleet.first.engine._admission

    def full(*_):
        raise Overloaded("there is no room", retry_after=3)

    monkeypatch.setattr(admission, "check", full)
    assert (await ask(one.client, AWAY)).status_code == 200
    assert len(asked_here(one)) == 1
    # It is only full: the next request tries again.
    monkeypatch.undo()
    assert (await ask(one.client, AWAY)).status_code == 200
    assert len(asked_here(other)) == 1


@asynccontextmanager
async def mute():
    """A server that takes connections and answers nothing."""
    opened = []

    async def take(reader, writer):
        opened.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", opened
    finally:
        server.close()
        for writer in opened:
            writer.close()


async def test_a_home_that_stands_still_is_gone_after_some_beats(two, make_adapter, monkeypatch):
    one, other = two
    await push(one, make_adapter, AWAY)
    asked = len(asked_here(other))
    async with mute() as (address, opened):
        # Its process stands still: the kernel takes connections, and nobody writes its row.
        other.membership.address = address
        peer = one.membership.peers[0]
        assert await settled(lambda: peer.address == address)
        answering = asyncio.create_task(ask(one.client, AWAY))
        assert await settled(lambda: opened)
        assert not answering.done()
        monkeypatch.setattr(other.heartbeat, "_exchange", lambda row, gone: [])
        monkeypatch.setattr("serve.fleet.heartbeat.MISSED", 5)
        assert (await asyncio.wait_for(answering, 60)).status_code == 200
    assert len(asked_here(one)) == 1 and len(asked_here(other)) == asked
    assert not one.membership.peers


async def test_a_row_that_nobody_writes_is_no_server(two):
    one, _ = two
    registry = one.app.state.parts.registry
    report = {"bases": ["base"], "slots": 4, "max_rank": 16, "load": 0.0, "held": [], "total": 0.0, "rates": {}}
    row = {"node": "there", "phase": "ready", "generation": 0, "seen": 1e12, "address": "http://127.0.0.1:9"}
    row["report"] = json.dumps(report)

    def write(statement):
        with registry.adding() as connection:
            connection.execute(statement)

    await asyncio.to_thread(write, insert(replicas).values(id="dead", **row))
    for _ in range(3):
        await one.heartbeat.beat()
    assert [peer.id for peer in one.membership.peers] == ["other"]
    await asyncio.to_thread(write, update(replicas).where(replicas.c.id == "dead").values(seen=1.0))
    await one.heartbeat.beat()
    assert {peer.id for peer in one.membership.peers} == {"other", "dead"}


async def test_servers_of_other_models_share_no_homes(config, tiny_model, tmp_path, registry_of_one):
    async with serving(config, tiny_model, tmp_path, registry_of_one) as (one, other):
        assert await settled(lambda: one.membership.peers and other.membership.peers)
        third = FakeBackend(str(tiny_model))
        third.name = "another"
        own = replace(
            config, registry=registry_of_one, blobs=f"file://{tmp_path}/shared", name="another", data_dir=tmp_path / "3"
        )
        async with Serving(replace(own, admin_keys=keys_hashed(["run"])), third, "third") as another:
            for _ in range(3):
                await another.heartbeat.beat()
                await one.heartbeat.beat()
            assert another.membership.address and not another.membership.peers
            assert [peer.id for peer in one.membership.peers] == ["other"]


async def test_a_server_without_an_address_sends_nothing_on(connect, config, tmp_path, registry_of_one):
    async with connect(replace(config, registry=registry_of_one)) as client:
        assert client._transport.app.state.parts.membership is None


async def test_a_new_version_is_loaded_by_its_home_and_by_no_other(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY, HERE)
    assert await settled(lambda: any(id.startswith(AWAY) for id in other.backend.held))
    assert not any(id.startswith(HERE) for id in other.backend.held)


async def rated(server, name):
    """How many good ratings a server has counted for an adapter."""
    lines = (await server.client.get("/metrics")).text.splitlines()
    of = [line for line in lines if line.startswith("loradock_feedback_total") and f'"{name}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in of if 'rating="good"' in line)


async def test_feedback_is_taken_by_any_server_and_counts_once_where_the_answer_came_from(two, make_adapter):
    one, other = two
    await push(one, make_adapter, AWAY, HERE)
    for name in (AWAY, HERE):
        for asked, told in ((one, other), (other, one), (one, one)):
            id = (await ask(asked.client, name)).headers["x-request-id"]
            rating = {"request_id": id, "rating": 1.0}
            answer = await told.client.post("/v1/feedback", json=rating)
            assert answer.status_code == 200, answer.text
            assert answer.json()["rating"] == 1.0
            # Once.
            assert (await asked.client.post("/v1/feedback", json=rating)).status_code == 404
    # Read once: what was read is shown again for a while.
    for name, home in ((AWAY, other), (HERE, one)):
        counts = {server: await rated(server, name) for server in (one, other)}
        assert counts == {home: 3, (one if home is other else other): 0}
    unknown = {"request_id": "0" * 32, "rating": 1.0}
    assert (await one.client.post("/v1/feedback", json=unknown)).status_code == 404


async def test_a_home_that_cannot_look_at_the_registry_answers_nothing_that_is_sent_on(two, make_adapter, monkeypatch):
    one, home = two
    ids = []
    for seed in (0, 1):
        pushed = await one.client.post(
            "/v1/adapters", **upload(make_adapter(seed), name=AWAY, promote=str(not seed).lower())
        )
        ids.append(pushed.json()["id"])
    assert (await ask(one.client, AWAY)).json() == {"model": ids[0]} and not asked_here(one)
    parts = home.app.state.parts

    def gone():
        raise EngineUnavailable("the registry is gone")

    with monkeypatch.context() as patch:
        patch.setattr(parts.registry, "stamp", gone)
        assert await settled(lambda: parts.follower.problem)
        promoted = await one.client.post(f"/v1/adapters/{AWAY}/promote", json={"version": 2})
        assert promoted.status_code == 200
        for _ in range(3):
            assert (await ask(one.client, AWAY)).json() == {"model": ids[1]}
        # Who asks it itself is answered from what it read last.
        answer = await ask(home.client, AWAY)
        assert answer.json() == {"model": ids[0]} and "x-loradock-registry-age" in answer.headers


async def test_what_was_rolled_back_here_alone_is_answered_here(two, make_adapter, monkeypatch):
    """Its home has not heard of that: the registry answers nobody."""
    one, _ = two
    ids = [
        (await one.client.post("/v1/adapters", **upload(make_adapter(seed), name=AWAY))).json()["id"] for seed in (0, 1)
    ]
    assert (await ask(one.client, AWAY)).json() == {"model": ids[1]} and not asked_here(one)
    registry = one.app.state.parts.registry

    def gone():
        raise EngineUnavailable("the registry is gone")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_down", gone)
        registry.roll_back_here(AWAY, by="somebody")
        assert (await ask(one.client, AWAY)).json() == {"model": ids[0]} and asked_here(one)


async def test_bytes_of_an_adapter_stay_where_it_is_at_home_and_go_elsewhere(two, make_adapter, monkeypatch):
    one, other = two

    async def none(*_):
        """Nothing comes back by itself for having been asked just now."""

    monkeypatch.setattr("serve.rollout.prefetch.Prefetcher.prefetch", none)
    for seed, name in enumerate((AWAY, HERE)):
        pushed = await one.client.post("/v1/adapters", **upload(make_adapter(seed), name=name))
        assert pushed.status_code == 201, pushed.text
    digests = {name: one.app.state.parts.registry.live(name).digest for name in (AWAY, HERE)}
    marked = {MARK.decode(): "somebody"}
    for server in two:
        for name in digests:
            answer = await server.client.post(CHAT, json={"model": name, "messages": []}, headers=marked)
            assert answer.status_code == 200

    async def evicted(server):
        parts = server.app.state.parts
        await parts.lifecycle.evict_strangers()
        return {name for name, digest in digests.items() if not parts.store.has(digest)}

    assert await evicted(one) == set(), "they were used within the day"
    monkeypatch.setattr("serve.rollout.lifecycle.UNUSED_SECONDS", -60.0)
    assert await evicted(one) == set(), "they are loaded"
    for server in two:
        base = server.app.state.parts.fleet.first
        for id in list(server.backend.held):
            base.engine.retire(id)
        assert await settled(lambda base=base: not base.engine.residents)
    # What was registered before there was a common place is nowhere else.
    with monkeypatch.context() as patch:
        patch.setattr(one.app.state.parts.store.shared, "has", lambda digest: False)
        assert await evicted(one) == set()
    assert await evicted(one) == {AWAY} and await evicted(other) == {HERE}
    answer = await one.client.post(CHAT, json={"model": AWAY, "messages": []}, headers=marked)
    assert answer.status_code == 200 and one.app.state.parts.store.has(digests[AWAY]), "it comes back when it is asked"


async def talk(server, name, *said, user="me", earlier=()):
    """A conversation, of which each answer repeats what was said; the ids of its answers. What was said `earlier` may
    have been answered by another server."""
    messages, ids = [], []
    for text in earlier:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": f"answer to {text}"})
    for text in said:
        messages.append({"role": "user", "content": text})
        headers = {MARK.decode(): "somebody"}  # it is answered where it was asked
        body = {"model": name, "messages": messages, "user": user}
        answer = await server.client.post(CHAT, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        ids.append(answer.headers["x-request-id"])
        messages.append({"role": "assistant", "content": f"answer to {text}"})
    return ids


async def kept(server, name):
    """The ids of the requests that a server keeps, once it has written all that it was asked."""
    captures = server.app.state.parts.captures
    await asyncio.to_thread(captures.worker.settle)
    rows = await asyncio.to_thread(lambda: list(captures.conversations.rows("default", [name])))
    return {row.id for row in rows}


@pytest.fixture
async def learning(config, tiny_model, tmp_path, registry_of_one, make_adapter):
    """As `two`, and adapters learn."""
    policies = parse({"*": {"train_on_traffic": True}})
    async with serving(config, tiny_model, tmp_path, registry_of_one, policies=policies) as servers:
        assert await settled(lambda: all(len(server.membership.peers) == 1 for server in servers))
        for server in servers:
            backend = server.backend
            backend.generate = lambda fields, plain=backend.generation: replace(
                plain, text=f"answer to {fields['messages'][-1]['content']}"
            )
        await push(servers[0], make_adapter, AWAY)
        yield servers


async def test_a_conversation_that_is_deleted_through_one_server_is_deleted_on_all(learning):
    one, other = learning
    texts = ["who are you?", "and where?", "and when?"]
    # It goes on with another server: that one knows all of it.
    begun = await talk(one, AWAY, *texts[:2])
    went_on = await talk(other, AWAY, texts[2], earlier=texts[:2])
    strangers = await talk(other, AWAY, texts[0], user="somebody else")
    assert await kept(one, AWAY) == set(begun) and await kept(other, AWAY) == {*went_on, *strangers}
    path = f"/v1/adapters/{AWAY}/data/conversations"
    # By the id of an answer that this server did not give.
    gone = await one.client.delete(f"{path}/{went_on[-1]}")
    assert gone.status_code == 200 and gone.json()["requests"] == 1, gone.text
    for server in learning:
        await server.app.state.parts.captures.datasets.apply_deletions()
    assert await kept(one, AWAY) == set() and await kept(other, AWAY) == set(strangers)
    assert (await one.client.delete(f"{path}/{went_on[-1]}")).status_code == 404
    assert (await one.client.delete(f"{path}/nobody")).status_code == 404


async def test_a_build_holds_nothing_that_was_deleted_through_another_server(learning, monkeypatch):
    one, other = learning
    begun = await talk(one, AWAY, "who are you?", "and where?")
    went_on = await talk(other, AWAY, "and when?", earlier=("who are you?", "and where?"))
    assert await kept(one, AWAY) == set(begun) and await kept(other, AWAY) == set(went_on)
    path = f"/v1/adapters/{AWAY}/data"
    assert (await other.client.delete(f"{path}/conversations/{went_on[0]}")).status_code == 200
    built = (await one.client.post(path, json={})).json()
    assert built["training_file"] is None and await kept(one, AWAY) == set(), built


async def test_a_deletion_that_the_registry_does_not_take_deletes_nothing(learning, monkeypatch):
    one, _ = learning
    ids = await talk(one, AWAY, "who are you?")
    assert await kept(one, AWAY) == set(ids)
    path = f"/v1/adapters/{AWAY}/data/conversations/{ids[0]}"

    def gone(*_):
        raise EngineUnavailable("the registry is gone")

    with monkeypatch.context() as patch:
        patch.setattr(one.app.state.parts.registry, "adding", gone)
        assert (await one.client.delete(path)).status_code == 503
    assert await kept(one, AWAY) == set(ids)
    assert (await one.client.delete(path)).status_code == 200
    assert await kept(one, AWAY) == set()
