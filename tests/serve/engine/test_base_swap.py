"""Another model takes a base's place while requests flow; whatever fails, the old one goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from dataclasses import replace

import pytest

from serve.engine.engine import Phase
from serve.engine.restarts import StartTurn
from serve.server.assembly import build_app
from tests.support import tiny
from tests.support.app import ask, push_two, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled


@pytest.fixture
def export(tiny_model, tmp_path):
    """Another checkpoint of the same shapes."""
    return shutil.copytree(tiny_model, tmp_path / "export")


@pytest.fixture
async def served(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    return client


@pytest.fixture
async def base(served):
    return served._transport.app.state.parts.fleet.first


async def swap(client, model, **more):
    return await client.post("/v1/engines/base/swap", json={"model": str(model), **more})


async def test_requests_go_to_the_new_base_and_those_under_way_finish_on_the_old(served, backend, base, export):
    (held,) = backend.held
    backend.flow.clear()
    answering = asyncio.create_task(ask(served, "tone", stream=True))
    assert await settled(lambda: backend.running == 1)
    told = await swap(served, export)
    assert told.status_code == 200, told.text
    body = told.json()
    assert body["model"] == str(export)
    assert [(one["adapter"], one["lost"], one["problem"]) for one in body["adapters"]] == [("tone@v1", 0.0, "")]
    (heir,) = backend.heirs
    assert heir.held and (await ask(served, "tone")).json() == {"model": held}
    assert heir.bodies and not backend.stops
    backend.flow.set()
    whole = await answering
    assert whole.text.endswith("[DONE]\n\n")
    assert await settled(lambda: backend.stops == 1)
    cards = (await served.get("/v1/models")).json()["data"]
    assert cards[0]["root"] == str(export)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda heir: setattr(heir, "wont_start", "too large"), "too large"),
        (lambda heir: setattr(heir, "effects", {"tone": 0.1}), "tone@v1"),
        (lambda heir: setattr(heir, "refuse", "no such kernel"), "tone@v1"),
        (lambda heir: setattr(heir, "no_room", True), "no room"),
    ],
)
@pytest.mark.parametrize("drain_first", [False, True])
async def test_whatever_fails_the_old_base_goes_on(served, backend, base, export, tiny_model, wrong, says, drain_first):
    def first_alone(heir):
        if len(backend.heirs) == 1:
            wrong(heir)

    backend.prepare = first_alone
    told = await swap(served, export, drain_first=drain_first)
    if says == "no room" and drain_first:
        assert told.status_code == 200
        return
    assert told.status_code == 409
    assert says in told.json()["error"]["message"]
    assert (await ask(served, "tone")).status_code == 200
    assert base.is_ready and base.model == str(tiny_model)
    assert bool(backend.stops) == drain_first


async def test_an_adapter_that_would_do_something_else_stops_the_swap_unless_it_is_forced(
    served, backend, base, export
):
    backend.prepare = lambda heir: setattr(heir, "effects", {"tone": 0.1})
    told = await swap(served, export)
    error = told.json()["error"]
    assert (told.status_code, error["code"]) == (409, "swap_refused")
    (adapter,) = error["adapters"]
    assert (adapter["before"], adapter["after"], adapter["lost"]) == (0.5, 0.1, 0.8)
    assert backend.heirs[0].stops == 1
    forced = await swap(served, export, force=True)
    assert forced.status_code == 200
    assert base.model == str(export)


async def test_going_back_to_the_model_that_an_adapter_was_approved_on_is_not_gated(
    served, backend, base, export, tiny_model, make_adapter
):
    backend.prepare = lambda heir: setattr(heir, "effects", {"tone": 0.1} if heir.model == str(export) else {})
    assert (await swap(served, export, force=True)).status_code == 200
    back = await swap(served, tiny_model)
    assert back.status_code == 200, back.text
    (adapter,) = back.json()["adapters"]
    assert (adapter["before"], adapter["after"], adapter["lost"], adapter["problem"]) == (0.1, 0.5, 4.0, "")
    assert (await swap(served, export, force=True)).status_code == 200
    await served.post("/v1/adapters", **upload(make_adapter(1)))
    refused = await swap(served, tiny_model)
    assert refused.status_code == 409, "that version was never seen on this model"
    assert [one["adapter"] for one in refused.json()["error"]["adapters"] if one["problem"]] == ["tone@v2"]


async def test_what_is_pushed_while_the_new_base_starts_is_there_when_it_serves(
    served, backend, base, export, make_adapter
):
    go = asyncio.Event()
    backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    swapping = asyncio.create_task(swap(served, export))
    assert await settled(lambda: len(backend.heirs) == 1)
    pushed = (await served.post("/v1/adapters", **upload(make_adapter(1)))).json()
    go.set()
    told = await swapping
    assert "tone@v2" in [one["adapter"] for one in told.json()["adapters"]]
    assert pushed["id"] in backend.heirs[0].held
    assert (await ask(served, "tone")).json() == {"model": pushed["id"]}


async def test_a_drain_first_lets_requests_wait_and_fails_none(served, backend, base, export):
    go = asyncio.Event()
    backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    swapping = asyncio.create_task(swap(served, export, drain_first=True))
    assert await settled(lambda: base.phase is Phase.DRAINING and backend.stops == 1)
    assert (await served.get("/ready")).status_code == 503
    asking = asyncio.create_task(ask(served, "tone"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    go.set()
    assert (await swapping).status_code == 200
    assert (await asking).status_code == 200


async def test_only_one_swap_at_a_time(served, backend, export):
    go = asyncio.Event()
    backend.prepare = lambda heir: setattr(heir, "start", go.wait)
    swapping = asyncio.create_task(swap(served, export))
    assert await settled(lambda: len(backend.heirs) == 1)
    assert (await swap(served, export)).status_code == 409
    go.set()
    assert (await swapping).status_code == 200


async def test_a_restart_of_the_server_begins_with_the_model_that_was_swapped_in(
    connect, config, backend, tiny_model, export
):
    async with connect(config) as client:
        assert (await swap(client, export)).status_code == 200
    again = FakeBackend(str(tiny_model))
    async with connect(config, again) as client:
        assert client._transport.app.state.parts.fleet.first.model == str(export)
        assert (await swap(client, tiny_model)).status_code == 200
    third = FakeBackend(str(tiny_model))
    async with connect(config, third):
        assert (third.starts, third.heirs) == (1, [])


async def test_a_model_that_is_gone_when_the_server_starts_gives_its_place_back(connect, config, backend, export):
    async with connect(config) as client:
        assert (await swap(client, export)).status_code == 200
    again = FakeBackend(backend.model)
    again.prepare = lambda heir: setattr(heir, "wont_start", "there is no such folder")
    async with connect(config, again) as client:
        assert client._transport.app.state.parts.fleet.first.model == backend.model
        assert (await ask(client, "base")).status_code == 200


async def test_a_checkpoint_is_held_against_its_manifest(served, base, export):
    config = export / "config.json"
    files = {"config.json": {"sha256": hashlib.sha256(config.read_bytes()).hexdigest()}}
    (export / "manifest.json").write_text(json.dumps({"files": files}))
    config.write_text(config.read_text() + "\n")
    told = await swap(served, export)
    assert told.status_code == 409 and "config.json" in told.json()["error"]["message"]
    assert base.is_ready


@pytest.mark.parametrize("model", ["/no/such/folder", "nothing", ""])
async def test_a_model_that_is_not_there_is_a_sentence(served, model):
    told = await swap(served, model)
    assert told.status_code == 400 and "model" in told.json()["error"]["message"]


async def test_an_engine_that_dies_after_a_swap_comes_back_over_the_new_model(served, backend, base, export):
    await swap(served, export)
    backend.heirs[0].dead = True
    assert await settled(lambda: base.restarts == 1 and base.is_ready)
    assert base.model == str(export)


# Several bases


@pytest.fixture
async def two(connect, config, backend, tiny_model):
    """A client of a server with a base `base` and one called `small`."""
    small = FakeBackend(str(tiny_model))
    small.name = "small"
    started = connect(config)
    started.app = build_app(config, [backend, small])
    async with started as client:
        yield client, backend, small


async def test_each_base_has_its_adapters_and_answers_for_them(two, make_adapter):
    client, backend, small = two
    first = (await client.post("/v1/adapters", **upload(make_adapter(0), "tone"))).json()
    other = (await client.post("/v1/adapters", **upload(make_adapter(1), "other", engine="small"))).json()
    assert (set(backend.held), set(small.held)) == ({first["id"]}, {other["id"]})
    assert (first["engine"], other["engine"]) == ("base", "small")
    for model, where in (("tone", backend), ("other", small), ("small", small), ("base", backend), (None, backend)):
        count = len(where.bodies)
        assert (await ask(client, model)).status_code == 200
        assert len(where.bodies) == count + 1, model
    cards = {card["id"]: card["parent"] for card in (await client.get("/v1/models")).json()["data"]}
    assert cards == {
        "base": None,
        "small": None,
        "tone": "base",
        "tone@v1": "base",
        "other": "small",
        "other@v1": "small",
    }
    assert [row["name"] for row in (await client.get("/v1/engines")).json()["data"]] == ["base", "small"]


async def test_the_versions_of_a_name_stay_on_one_base(two, make_adapter):
    client, _, _ = two
    await client.post("/v1/adapters", **upload(make_adapter(0), "tone", engine="small"))
    assert (await client.post("/v1/adapters", **upload(make_adapter(1), "tone", engine="base"))).status_code == 409
    assert (await client.post("/v1/adapters", **upload(make_adapter(1), "tone"))).json()["engine"] == "small"
    assert (await client.post("/v1/adapters", **upload(make_adapter(2), "x", engine="nobody"))).status_code == 404
    assert (await client.post("/v1/adapters", **upload(make_adapter(2), "small"))).status_code == 409


async def test_one_base_that_dies_leaves_the_others_alone(two, make_adapter):
    client, _, small = two
    await client.post("/v1/adapters", **upload(make_adapter(0), "tone", engine="small"))
    small.prepare = lambda heir: setattr(heir, "start", asyncio.Event().wait)
    small.dead = True
    assert (await client.get("/ready")).status_code == 503
    assert (await ask(client, "base")).status_code == 200
    rows = (await client.get("/v1/engines")).json()["data"]
    assert await settled(lambda: len(small.heirs) == 1)
    rows = (await client.get("/v1/engines")).json()["data"]
    assert [row["phase"] for row in rows] == ["ready", "restarting"]


async def test_engines_that_die_together_start_one_after_the_other(two, monkeypatch):
    """Each measures how much of a GPU it takes by what is free before and after its own start."""
    _, *backends = two
    starting, most = [], []

    async def start(heir):
        starting.append(heir)
        most.append(len(starting))
        await asyncio.sleep(0.05)
        starting.remove(heir)

    monkeypatch.setattr("tests.support.backend.FakeBackend.start", start)
    fleet = two[0]._transport.app.state.parts.fleet
    for backend in backends:
        backend.dead = True
    assert await settled(lambda: all(base.restarts == 1 and base.is_ready for base in fleet))
    assert most == [1, 1]


async def test_an_engine_that_hangs_while_it_starts_does_not_keep_the_others_down_for_ever(caplog):
    turn, began = StartTurn(longest=0.05), []

    async def start(name, seconds):
        async with turn.taken(name):
            began.append(name)
            await asyncio.sleep(seconds)

    hanging = asyncio.create_task(start("hangs", 60))
    await start("other", 0) if await settled(lambda: began) else None
    assert began == ["hangs", "other"] and "other starts beside another one" in caplog.text
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    async with asyncio.timeout(60):
        await start("third", 0)


async def test_changes_that_arrive_while_it_drains_first_hold_no_request_up(
    connect, config, backend, export, make_adapter
):
    async with connect(replace(config, restart_wait=30.0)) as client:
        await push_two(client, make_adapter)
        base, go = client._transport.app.state.parts.fleet.first, asyncio.Event()
        backend.prepare = lambda heir: setattr(heir, "start", go.wait)
        swapping = asyncio.create_task(swap(client, export, drain_first=True))
        assert await settled(lambda: base.phase is Phase.DRAINING and backend.stops == 1)
        changes = [
            asyncio.create_task(client.post("/v1/adapters/tone/promote", json={"version": 2})),
            asyncio.create_task(client.post("/v1/adapters", **upload(make_adapter(7), "late"))),
        ]
        asking = asyncio.create_task(ask(client, "tone"))
        await asyncio.sleep(0.1)
        go.set()
        assert (await asyncio.wait_for(swapping, 60)).status_code == 200
        assert (await asyncio.wait_for(asking, 60)).status_code == 200
        assert [(await asyncio.wait_for(change, 60)).status_code for change in changes] == [200, 201]


async def test_an_adapter_whose_bytes_are_lost_stops_a_swap_unless_it_is_forced(served, backend, base, export):
    parts = served._transport.app.state.parts
    (digest,) = parts.registry.digests()
    shutil.rmtree(parts.store.path(digest))
    refused = await swap(served, export)
    assert refused.status_code == 409 and "tone@v1" in refused.json()["error"]["message"]
    forced = await swap(served, export, force=True)
    assert forced.status_code == 200, forced.text
    assert [adapter["adapter"] for adapter in forced.json()["adapters"] if adapter["problem"]] == ["tone@v1"]
    assert base.model == str(export)


@pytest.mark.parametrize("drain_first", [False, True])
async def test_an_error_that_nobody_foresaw_is_a_conflict_and_the_old_base_goes_on(
    served, backend, base, export, tiny_model, drain_first
):
    async def wrong():
        raise TypeError("an unexpected keyword argument")

    def first_alone(heir):
        if len(backend.heirs) == 1:
            heir.start = wrong

    backend.prepare = first_alone
    told = await swap(served, export, drain_first=drain_first)
    assert told.status_code == 409 and "TypeError" in told.json()["error"]["message"]
    assert (await ask(served, "tone")).status_code == 200
    assert base.model == str(tiny_model)


async def test_an_engine_that_a_swap_was_starting_ends_with_the_server(connect, config, backend, export):
    async with connect(config) as client:
        backend.prepare = lambda heir: setattr(heir, "start", asyncio.Event().wait)
        swapping = asyncio.create_task(swap(client, export))
        assert await settled(lambda: len(backend.heirs) == 1)
    assert backend.heirs[0].stops
    swapping.cancel()


async def test_an_export_is_hashed_and_its_swap_recorded_off_the_event_loop(served, export, monkeypatch):
    parts, threads = served._transport.app.state.parts, {}
    record = parts.registry.swap

    def note(what, then=lambda *args, **more: None):
        def noted(*args, **more):
            threads[what] = threading.current_thread()
            return then(*args, **more)

        return noted

    monkeypatch.setattr("serve.engine.base_swap.verify", note("hashed"))
    monkeypatch.setattr(parts.registry, "swap", note("recorded", record))
    assert (await swap(served, export)).status_code == 200
    assert threads.keys() == {"hashed", "recorded"}
    assert threading.main_thread() not in threads.values()


async def test_an_adapter_that_changes_nothing_yet_does_not_stand_in_the_way(client, backend, export, make_adapter):
    backend.effects["tone"] = 0.0
    backend.prepare = lambda heir: heir.effects.update(tone=0.0)
    pushed = await client.post("/v1/adapters", **upload(tiny.untrained(make_adapter()), probe="false"))
    assert pushed.status_code == 201, pushed.text
    told = await swap(client, export)
    assert told.status_code == 200, told.text
    assert [(row["adapter"], row["problem"]) for row in told.json()["adapters"]] == [("tone@v1", "")]
