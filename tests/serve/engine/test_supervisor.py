"""Engines come and go under a server that stays."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from dataclasses import replace

import pytest

from serve.engine.engine import Phase
from serve.errors import ConfigError, LoradockError
from serve.server.assembly import build_app
from tests.support.app import ask, http, upload
from tests.support.waiting import settled


@pytest.fixture
async def served(connect, config, make_adapter):
    """A client of a server with an adapter."""
    async with connect(replace(config, restart_wait=20.0, hang_timeout=0.5, max_restarts=2)) as client:
        await client.post("/v1/adapters", **upload(make_adapter()))
        yield client


@pytest.fixture
async def base(served):
    return served._transport.app.state.parts.fleet.first


def never_ready(heir):
    heir.wont_start = "no memory"


async def test_a_dead_engine_is_replaced_by_one_that_holds_its_adapters_before_it_is_ready(served, backend, base):
    (held,) = backend.held
    backend.dead = True
    assert await settled(lambda: base.phase is Phase.RESTARTING)
    assert (await served.get("/ready")).status_code == 503
    assert (await ask(served, "tone")).json() == {"model": held}
    (heir,) = backend.heirs
    assert set(heir.held) == {held}
    assert (await served.get("/ready")).status_code == 200
    assert base.restarts == 1
    assert base.described()["last_restart"] == {"at": pytest.approx(time.time(), abs=60), "reason": backend.cause}
    assert backend.stops == 1


async def test_of_an_engine_that_cannot_start_its_own_error_is_all_that_is_said(base, backend, monkeypatch, caplog):
    """Its model's modules are read meanwhile, and are often as bad."""

    def unreadable(model):
        raise ConfigError("it has no config.json")

    monkeypatch.setattr("serve.engine.supervisor.lora_modules", unreadable)
    backend.prepare = never_ready
    with pytest.raises(ConfigError, match="no memory"):
        await base.bring_up(base.fresh())
    await asyncio.sleep(0.1)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_an_answer_in_one_piece_ends_with_503_and_a_time_to_come_again(served, backend, base):
    backend.slow = "base"
    answering = asyncio.create_task(ask(served, "base"))
    assert await settled(lambda: base.leases == 1)
    backend.dead = True
    told = await asyncio.wait_for(answering, 60)
    assert told.status_code == 503
    assert int(told.headers["retry-after"]) >= 1
    assert "it was told to die" in told.json()["error"]["message"]
    assert base.leases == 0


async def test_a_stream_ends_with_an_error_event(served, backend, base):
    backend.flow.clear()
    app = served._transport.app
    scope, receive, send, sent, _ = http({"model": "base", "stream": True})
    answering = asyncio.create_task(app(scope, receive, send))
    assert await settled(lambda: len(sent) == 2)
    backend.dead = True
    await asyncio.wait_for(answering, 60)
    last = sent[-1]
    assert not last["more_body"]
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == (503, "service_unavailable")
    assert base.leases == 0


async def test_an_engine_that_takes_no_step_while_requests_wait_counts_as_dead(served, backend, base):
    backend.slow = "base"
    answering = asyncio.create_task(ask(served, "base"))
    assert await settled(lambda: base.leases == 1)
    backend.stalled = 0.4
    await asyncio.sleep(0.6)
    assert base.phase is Phase.READY
    backend.stalled = 0.6
    told = await asyncio.wait_for(answering, 60)
    assert "no step" in told.json()["error"]["message"]
    assert await settled(lambda: base.restarts == 1 and base.is_ready)


async def test_a_request_that_waits_for_an_engine_waits_no_longer_than_it_is_told(connect, config, backend):
    async with connect(replace(config, restart_wait=0.2)) as client:
        backend.prepare = lambda heir: setattr(heir, "start", asyncio.Event().wait)
        backend.dead = True
        assert await settled(lambda: client._transport.app.state.parts.fleet.first.phase is Phase.RESTARTING)
        told = await asyncio.wait_for(ask(client, "base"), 60)
    assert told.status_code == 503
    assert int(told.headers["retry-after"]) >= 1


async def test_after_too_many_deaths_it_stays_down_says_why_and_starts_again_by_hand(
    served, backend, base, monkeypatch
):
    monkeypatch.setattr("serve.engine.restarts.BACKOFF_SECONDS", 0.01)
    backend.prepare = never_ready
    backend.dead = True
    assert await settled(lambda: base.phase is Phase.FAILED)
    assert len(backend.heirs) == 2
    told = await ask(served, "base")
    assert told.status_code == 503
    assert "3 deaths" in told.json()["error"]["message"] and "no memory" in told.json()["error"]["message"]
    assert (await served.get("/health")).status_code == 200
    (row,) = (await served.get("/v1/engines")).json()["data"]
    assert row["phase"] == "failed" and "no memory" in row["reason"]
    backend.prepare = lambda heir: None
    await served.post("/v1/engines/base/restart")
    assert await settled(lambda: base.is_ready)
    assert (await ask(served, "tone")).status_code == 200


async def test_a_load_that_the_engines_death_breaks_off_is_503_and_the_push_may_be_tried_again(
    served, backend, base, make_adapter
):
    async def never(*_):
        await asyncio.Event().wait()

    backend.add = never
    pushing = asyncio.create_task(served.post("/v1/adapters", **upload(make_adapter(1))))
    assert await settled(lambda: base.leases == 1)
    backend.dead = True
    assert (await asyncio.wait_for(pushing, 60)).status_code == 503
    assert (await served.post("/v1/adapters", **upload(make_adapter(1)))).status_code == 201
    assert (await ask(served, "tone@v2")).status_code == 200


async def test_a_client_that_leaves_while_it_waits_for_an_engine_leaves_nothing(served, backend, base):
    backend.prepare = lambda heir: setattr(heir, "start", asyncio.Event().wait)
    backend.dead = True
    assert await settled(lambda: base.phase is Phase.RESTARTING)
    waiting = asyncio.create_task(ask(served, "base"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert base.leases == 0


async def test_the_series_of_an_engine_that_died_go_and_its_restarts_are_counted(served, backend, base):
    backend.dead = True
    assert await settled(lambda: base.restarts == 1 and base.is_ready)
    text = (await served.get("/metrics")).text
    assert 'loradock_engine_restarts_total{model="base"} 1.0' in text
    assert text.count("# TYPE vllm:tokens_total") == 1


async def test_an_engine_that_hangs_does_not_keep_the_operator_waiting(served, backend, monkeypatch):
    monkeypatch.setattr("serve.engine.supervisor.ASK_SECONDS", 0.1)
    (held,) = backend.held
    backend.resident = asyncio.Event().wait
    (row,) = (await asyncio.wait_for(served.get("/v1/engines"), 60)).json()["data"]
    assert row["resident"] == [held]


async def wrong():
    raise TypeError("an unexpected keyword argument")


async def test_an_error_that_nobody_foresaw_at_a_restart_is_tried_again_and_then_said(
    served, backend, base, monkeypatch
):
    monkeypatch.setattr("serve.engine.restarts.BACKOFF_SECONDS", 0.01)
    backend.prepare = lambda heir: setattr(heir, "start", wrong)
    backend.dead = True
    assert await settled(lambda: base.phase is Phase.FAILED)
    assert len(backend.heirs) == 2 and "TypeError" in base.reason
    assert "TypeError" in (await ask(served, "base")).json()["error"]["message"]


async def test_an_engine_that_does_not_even_end_leaves_the_supervisor_failed_with_the_reason(served, backend, base):
    async def stop(**_):
        raise OSError("no such process group")

    backend.stop = stop
    backend.dead = True
    assert await settled(lambda: base.phase is Phase.FAILED)
    assert "no such process group" in base.reason


async def test_an_engine_that_cannot_be_watched_is_replaced(served, backend, base):
    backend.stalled = None
    assert await settled(lambda: base.restarts == 1 and base.is_ready)


async def test_an_error_that_nobody_foresaw_at_the_start_is_told(config, backend):
    failures = []
    backend.start = wrong
    app = build_app(config, backend, failures.append)
    async with app.router.lifespan_context(app):
        assert await settled(lambda: failures)
        assert app.state.parts.fleet.first.phase is Phase.FAILED
    assert isinstance(failures[0], LoradockError) and "TypeError" in str(failures[0])
