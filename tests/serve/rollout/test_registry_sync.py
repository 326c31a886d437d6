"""Two servers on one registry and one place for adapters: what one changes holds on the other."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve.config import keys_hashed
from serve.errors import EngineUnavailable
from serve.fleet.heartbeat import ThisServer
from serve.rollout import registry_sync
from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.postgres import database
from tests.support.waiting import settled


@pytest.fixture(params=["sqlite, files", "postgresql, s3"])
def places(request, tmp_path):
    """A database, and a folder by URL, that both see."""
    if request.param == "sqlite, files":
        return f"sqlite:///{tmp_path}/registry.db", f"file://{tmp_path}/shared"
    request.getfixturevalue("s3")
    return database(request.getfixturevalue("postgres")), "s3://models/adapters"


@pytest.fixture
def config(config):
    """What was read a minute ago is too old to answer from."""
    return replace(config, registry_stale_seconds=60.0)


@pytest.fixture
async def pair(connect, config, tiny_model, tmp_path, places):
    """Clients of two servers that have keys, and their backends."""
    both = replace(config, registry=places[0], blobs=places[1], admin_keys=keys_hashed(["run"]))
    backends = [FakeBackend(str(tiny_model)) for _ in range(2)]
    async with AsyncExitStack() as stack:
        clients = []
        for number, backend in enumerate(backends):
            one = replace(both, data_dir=tmp_path / f"data-{number}")
            clients.append(await stack.enter_async_context(connect(one, backend)))
            clients[-1].headers["authorization"] = "Bearer run"
        yield *clients, *backends


LONG = "node" * 20


async def listed(client, count):
    """What a server says of those that live, once it has seen so many of them."""
    heartbeat = client._transport.app.state.parts.heartbeat
    assert await settled(lambda: len(heartbeat.living()) == count)
    return (await client.get("/v1/replicas")).json()["data"]


@pytest.fixture
async def long_named(connect, config, tiny_model, tmp_path, places, monkeypatch):
    """A client of a server whose node has a long name."""
    monkeypatch.setattr("serve.server.assembly.node", lambda: LONG)
    own = replace(config, registry=places[0], blobs=places[1], data_dir=tmp_path / "data")
    async with connect(own, FakeBackend(str(tiny_model))) as client:
        await client._transport.app.state.parts.heartbeat.beat()
        yield client


async def test_what_one_was_told_the_other_answers_from_at_once(pair, make_adapter):
    one, other, mine, _ = pair
    for seed in (0, 1):
        told = await one.post("/v1/adapters", **upload(make_adapter(seed)))
        assert told.status_code == 201, told.text
        assert (await ask(other, "tone")).json() == {"model": told.json()["id"]}
    first, second = (version["id"] for version in (await other.get("/v1/adapters/tone")).json()["versions"])
    for number in (1, 2, 1, 2, 1):
        asked, told = (one, other) if number == 1 else (other, one)
        assert (await asked.post("/v1/adapters/tone/promote", json={"version": number})).status_code == 200
        live = [first, second][number - 1]
        assert [(await ask(client, "tone")).json()["model"] for client in (told, asked, told)] == [live] * 3
    assert (await ask(other, "tone@v2")).json() == {"model": second}
    assert await settled(lambda: second not in mine.held), "the version that does not serve any more stays loaded"


async def test_a_promote_is_loaded_by_the_other_though_nobody_asks(pair, make_adapter):
    one, other, _, theirs = pair
    told = (await one.post("/v1/adapters", **upload(make_adapter()))).json()
    assert await settled(lambda: told["id"] in theirs.held)
    rows = await listed(other, 2)
    assert len({row["id"] for row in rows}) == 2
    assert [row["me"] for row in rows].count(True) == 1


async def test_a_key_that_one_issued_opens_the_other_until_it_is_revoked(pair):
    one, other, *_ = pair
    made = (await one.post("/v1/keys", json={"name": "ci"})).json()
    bearer = {"authorization": f"Bearer {made['secret']}"}
    assert (await other.get("/v1/models", headers=bearer)).status_code == 200
    assert (await one.delete(f"/v1/keys/{made['id']}")).status_code == 200
    assert (await other.get("/v1/models", headers=bearer)).status_code == 401


async def test_what_one_deletes_the_other_forgets(pair, make_adapter):
    one, other, _, theirs = pair
    told = (await one.post("/v1/adapters", **upload(make_adapter()))).json()
    assert (await ask(other, "tone")).status_code == 200
    assert (await one.delete("/v1/adapters/tone")).status_code == 200
    assert (await ask(other, "tone")).status_code == 404
    assert await settled(lambda: told["id"] not in theirs.held)


async def test_a_swap_of_the_base_is_followed(pair, make_adapter, tiny_model, tmp_path):
    one, other, *_ = pair
    await one.post("/v1/adapters", **upload(make_adapter()))
    export = shutil.copytree(tiny_model, tmp_path / "export")
    assert (await one.post("/v1/engines/base/swap", json={"model": str(export)})).status_code == 200
    base = other._transport.app.state.parts.fleet.first
    assert await settled(lambda: base.model == str(export))
    assert (await ask(other, "tone")).status_code == 200


async def test_answers_go_on_while_the_registry_does_not(pair, make_adapter):
    one, other, *_ = pair
    await one.post("/v1/adapters", **upload(make_adapter()))
    assert (await ask(other, "tone")).status_code == 200
    registry = other._transport.app.state.parts.fleet._base_of.__self__

    def gone():
        raise EngineUnavailable("the registry is gone")

    registry.stamp = gone
    assert (await ask(other, "tone")).status_code == 200


async def test_a_change_after_another_server_s_loses_neither(url):
    from serve.adapters.adapter import Inspection
    from serve.adapters.registry.registry import Registry

    found = Inspection(rank=8, base="toy", target_modules=("q_proj",), nbytes=1, tensors=2)
    with Registry(url) as one, Registry(url) as other:
        one.add("a", found, "a" * 64, by="one")
        other.add("b", found, "b" * 64, by="other")
        assert other.live("a") and other.live("b")
        before = one.stamp()
        one.refresh()
        assert one.live("b") and one.stamp() == before == other.stamp()


async def test_the_swap_proof_holds_with_two_servers_in_turn(pair, make_adapter):
    """A hundred promotes, each by one of the two, under clients that go from one to the other."""
    one, other, *_ = pair
    ids = [(await one.post("/v1/adapters", **upload(make_adapter(seed)))).json()["id"] for seed in (0, 1)]
    acknowledged, seen, stale, stop = [2], {}, [], False

    async def client(number):
        turn = number
        while not stop:
            turn += 1
            floor = acknowledged[0]
            told = (await ask((one, other)[turn % 2], "tone")).json()["model"]
            # Promotes are numbered; the live version is that number's parity.
            if floor == acknowledged[0] == begun[0] and told != ids[1 - floor % 2]:
                stale.append((floor, told))
            seen[told] = seen.get(told, 0) + 1

    begun = [2]
    crowd = [asyncio.create_task(client(number)) for number in range(8)]
    for number in range(3, 43):
        begun[0] = number
        server = (one, other)[number // 2 % 2]
        told = await server.post("/v1/adapters/tone/promote", json={"version": 2 - number % 2})
        assert told.status_code == 200
        acknowledged[0] = number
        await asyncio.sleep(0.02)
    stop = True
    await asyncio.gather(*crowd)
    assert not stale
    assert len(seen) == 2


@pytest.fixture
def outage(pair, monkeypatch):
    """The registry of the second server answers nothing, until it does again."""
    registry = pair[1]._transport.app.state.parts.registry
    broken = pytest.MonkeyPatch()

    def gone(*_, **__):
        raise EngineUnavailable("the registry is gone")

    def begin():
        for name in ("stamp", "refresh", "swapped", "transaction", "reading"):
            broken.setattr(registry, name, gone)

    yield SimpleNamespace(begin=begin, end=broken.undo)
    broken.undo()


async def test_an_outage_of_the_registry_is_seen_and_gets_over_without_a_restart(pair, make_adapter, outage):
    one, other, *_ = pair
    first = (await one.post("/v1/adapters", **upload(make_adapter(0)))).json()["id"]
    assert (await ask(other, "tone")).json() == {"model": first}
    outage.begin()
    parts = other._transport.app.state.parts
    assert await settled(lambda: "registry" in parts.health.degraded)
    await asyncio.sleep(1.5)  # heartbeats and looks at swaps fail meanwhile too
    assert (await ask(other, "tone")).json() == {"model": first}
    ready = await other.get("/ready")
    assert ready.status_code == 200 and "the registry is gone" in ready.json()["degraded"]["registry"]
    outage.end()
    second = (await one.post("/v1/adapters", **upload(make_adapter(1)))).json()["id"]
    assert (await ask(other, "tone")).json() == {"model": second}
    assert "registry" not in parts.health.degraded
    assert await listed(other, 2)


async def test_a_server_that_stood_still_itself_takes_the_registry_for_no_slow_one(pair, make_adapter, monkeypatch):
    one, other, *_ = pair
    await one.post("/v1/adapters", **upload(make_adapter(0)))
    monkeypatch.setattr(registry_sync, "LOOK_SECONDS", 1.0)
    follower = other._transport.app.state.parts.follower
    fails = []
    monkeypatch.setattr(follower, "_unseen", fails.append)
    for before in range(3):  # it stands still before a look, within one, and at its end
        looking = asyncio.create_task(follower.fresh())
        for _ in range(before):
            await asyncio.sleep(0)
        time.sleep(1.2)
        await looking
    assert not fails


async def unread(client, least, most):
    """Whether the series comes to lie between these; it is rendered once a second."""

    async def lies():
        lines = (await client.get("/metrics")).text.splitlines()
        seconds = next(line.split()[1] for line in lines if line.startswith("loradock_registry_unread_seconds "))
        return least <= float(seconds) <= most

    return await settled(lies)


def later(follower, seconds, monkeypatch):
    monkeypatch.setattr(follower, "_clock", lambda: time.monotonic() + seconds)


async def test_a_server_that_is_cut_off_says_how_old_what_it_answers_from_is(pair, make_adapter, outage, monkeypatch):
    one, other, *_ = pair
    first = (await one.post("/v1/adapters", **upload(make_adapter(0)))).json()["id"]
    answer = await ask(other, "tone")
    assert "x-loradock-registry-age" not in answer.headers and await unread(other, 0, 0)
    outage.begin()
    parts = other._transport.app.state.parts
    assert await settled(lambda: "registry" in parts.health.degraded)
    await one.post("/v1/adapters", **upload(make_adapter(1)))
    later(parts.follower, 30, monkeypatch)
    answer = await ask(other, "tone")
    assert answer.json() == {"model": first}
    assert 30 <= int(answer.headers["x-loradock-registry-age"]) < 60
    assert await unread(other, 30, 59)
    told = (await other.get("/ready")).json()["degraded"]["registry"]
    assert "(the registry is gone): answers go on from what was read then, for 60 s" in told
    assert re.search(r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", told)
    outage.end()
    assert "x-loradock-registry-age" not in (await ask(other, "tone")).headers and await unread(other, 0, 0)


async def test_beyond_the_bound_a_server_that_is_cut_off_answers_nobody(
    pair, make_adapter, outage, monkeypatch, caplog
):
    one, other, *_ = pair
    await one.post("/v1/adapters", **upload(make_adapter(0)))
    assert (await ask(other, "tone")).status_code == 200
    outage.begin()
    parts = other._transport.app.state.parts
    assert await settled(lambda: "registry" in parts.health.degraded)
    later(parts.follower, 61, monkeypatch)
    for answer in (
        await ask(other, "tone"),
        await ask(other, "base"),
        await other.get("/v1/adapters"),
        await other.post("/v1/adapters/tone/rollback"),
        await other.get("/ready"),
        await other.get("/ping"),
    ):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "answers nobody, for registry_stale_seconds is 60" in answer.json()["error"]["message"]
    assert (await other.get("/health")).status_code == 200
    assert await unread(other, 61, 1000)
    assert sum("answers nobody" in record.message for record in caplog.records) == 1
    outage.end()
    assert (await ask(other, "tone")).status_code == 200
    assert (await other.get("/ready")).status_code == 200


async def test_a_name_that_only_others_can_know_is_no_404_while_the_registry_cannot_be_looked_at(
    pair, make_adapter, outage
):
    one, other, *_ = pair
    assert (await ask(other, "tone")).status_code == 404
    outage.begin()
    assert await settled(lambda: "registry" in other._transport.app.state.parts.health.degraded)
    for answer in (
        await ask(other, "tone"),
        await other.get("/v1/adapters/tone"),
        await other.get("/v1/models/tone"),
    ):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "cannot look at the registry now" in answer.json()["error"]["message"]
    outage.end()
    await one.post("/v1/adapters", **upload(make_adapter(0)))
    assert (await ask(other, "tone")).status_code == 200
    assert (await ask(other, "nobody")).status_code == 404


async def test_an_error_that_nobody_foresaw_in_a_look_is_no_requests_error(pair, make_adapter, monkeypatch):
    one, other, *_ = pair
    await one.post("/v1/adapters", **upload(make_adapter()))
    parts = other._transport.app.state.parts

    def wrong():
        raise RuntimeError("cannot schedule new futures after shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(parts.registry, "stamp", wrong)
        assert (await ask(other, "base")).status_code == 200
        assert "RuntimeError" in parts.health.degraded["registry"]
    assert (await ask(other, "tone")).status_code == 200


async def test_who_asks_a_server_that_stops_does_not_make_it_take_the_registry_for_a_dead_one(pair):
    follower = pair[0]._transport.app.state.parts.follower
    await follower.close()
    await follower.fresh()
    assert not follower.problem


async def test_a_base_that_is_not_served_here_keeps_no_other_change_away(pair, make_adapter):
    one, other, *_ = pair
    told = (await one.post("/v1/adapters", **upload(make_adapter(0), "elsewhere"))).json()
    registry = one._transport.app.state.parts.registry
    with registry.transaction() as connection:
        connection.exec_driver_sql("UPDATE names SET base = 'a-base-of-others' WHERE name = 'elsewhere'")
    registry.note("elsewhere", "drift", told["version"], by="test")
    pushed = (await one.post("/v1/adapters", **upload(make_adapter(1)))).json()
    assert (await ask(other, "tone")).json() == {"model": pushed["id"]}
    store = other._transport.app.state.parts.lifecycle.store
    assert store.has(pushed["digest"])
    await one.delete("/v1/adapters/tone")
    assert await settled(lambda: not store.has(pushed["digest"]))


async def test_a_key_that_a_server_with_a_slow_clock_revoked_opens_nothing_elsewhere(pair):
    one, other, *_ = pair
    made = [(await one.post("/v1/keys", json={"name": f"ci-{number}"})).json() for number in range(2)]
    bearers = [{"authorization": f"Bearer {key['secret']}"} for key in made]
    assert (await one.delete(f"/v1/keys/{made[0]['id']}")).status_code == 200
    assert (await other.get("/v1/models", headers=bearers[0])).status_code == 401
    one._transport.app.state.parts.keys._clock = lambda: 1e9
    assert (await one.delete(f"/v1/keys/{made[1]['id']}")).status_code == 200
    assert (await other.get("/v1/models", headers=bearers[1])).status_code == 401


async def test_a_server_with_a_long_name_beats_under_a_shorter_one(long_named):
    """A node's name has up to 64 letters of its own."""
    rows = (await long_named.get("/v1/replicas")).json()["data"]
    assert [(row["me"], len(row["id"]), row["id"][:51]) for row in rows] == [(True, 64, LONG[:51])]
    assert ThisServer(LONG, "").id == ThisServer(LONG, "").id != ThisServer(LONG + "b", "").id
