from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import uvloop

from serve.engine.engine import LOW_PRIORITY, SETTLE, Engine
from serve.engine.payer import PROBES, Cause, Payer
from serve.errors import AdapterRejected, EngineUnavailable
from tests.support.waiting import settled


@pytest.fixture
async def engine(backend):
    engine = Engine(backend)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def path(make_adapter):
    return make_adapter()


async def test_requests_for_a_cold_adapter_share_one_load(engine, backend, path):
    await asyncio.gather(*(engine.ensure("tone@1", path) for _ in range(20)))
    assert backend.loads == 1


def test_a_load_is_not_said_to_have_taken_longer_than_it_did(backend, path):
    """The server's loop tells the time in whole milliseconds."""

    async def loads() -> list[tuple[float, float]]:
        engine = Engine(backend)
        await engine.start()
        seen = []
        for number in range(20):
            began = time.perf_counter()
            async with engine.lease(f"tone@{number}", path, payer=PROBES) as lease:
                seen.append((lease.load_seconds, time.perf_counter() - began))
        await engine.stop()
        return seen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert all(0 < said <= took for said, took in runner.run(loads()))


async def test_a_waiter_that_leaves_does_not_stop_the_load_of_the_others(engine, backend, path):
    leaving = asyncio.create_task(engine.ensure("tone@1", path))
    staying = asyncio.create_task(engine.ensure("tone@1", path))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    assert (backend.loads, engine.leases) == (1, 0)


async def test_a_retired_adapter_leaves_with_its_last_lease(engine, backend, path):
    async with engine.lease("tone@1", path, payer=PROBES):
        async with engine.lease("tone@1", path, payer=PROBES):
            engine.retire("tone@1")
        await asyncio.sleep(3 * SETTLE)
        assert "tone@1" in backend.held
    await engine.gone("tone@1")
    await asyncio.sleep(0)
    assert not backend.held


async def test_a_new_lease_calls_a_retired_adapter_back(engine, backend, path):
    await engine.ensure("tone@1", path)
    engine.retire("tone@1")
    await engine.ensure("tone@1", path)
    await asyncio.sleep(3 * SETTLE)
    assert "tone@1" in backend.held
    assert backend.loads == 1


async def test_an_adapter_comes_back_under_a_number_that_was_never_used(engine, backend, path):
    for _ in range(3):
        await engine.ensure("tone@1", path)
        await engine.gone("tone@1")
        await asyncio.sleep(0)
    assert backend.numbers == [1, 2, 3]


async def test_a_load_that_fails_is_forgotten_and_may_be_tried_again(engine, backend, path):
    backend.refuse = "no"
    with pytest.raises(AdapterRejected):
        await engine.ensure("tone@1", path)
    backend.refuse = None
    await engine.ensure("tone@1", path)
    assert (await engine.resident_ids(), engine.leases) == (["tone@1"], 0)


async def test_the_longest_unused_makes_room_and_those_in_use_stay(engine, backend, path):
    async with engine.lease("tone@0", path, payer=PROBES):
        for number in range(1, 10):
            await engine.ensure(f"tone@{number}", path)
        assert await settled(lambda: sorted(backend.held) == ["tone@0", "tone@7", "tone@8", "tone@9"]), backend.held


async def test_an_engine_that_is_not_ready_says_so_and_counts_no_lease(backend):
    engine = Engine(backend)
    with pytest.raises(EngineUnavailable, match="starting"):
        async with engine.lease(payer=PROBES):
            pass
    assert engine.leases == 0


async def test_a_dead_backend_takes_no_lease(engine, backend):
    backend.dead = True
    with pytest.raises(EngineUnavailable):
        async with engine.lease("tone@1", Path("/nowhere"), payer=PROBES):
            pass
    assert engine.leases == 0


async def test_never_more_is_loaded_than_fits_and_who_is_pushed_out_while_waiting_comes_back(engine, backend, path):
    """Ten adapters are wanted at once, two have a slot, four fit."""
    most = 0

    async def ask(number):
        nonlocal most
        async with engine.lease(f"tone@{number}", path, payer=Payer("acme", Cause.REQUEST, None)) as lease:
            assert lease.model in backend.held
            most = max(most, len(backend.held))
            await asyncio.sleep(0.02)
            assert lease.model in backend.held, "what answers is never pushed out"

    await asyncio.gather(*(ask(number % 10) for number in range(40)))
    assert most <= backend.max_resident
    assert (engine.leases, engine.queue.waiting, engine.queue.busy) == (0, 0, 0)


async def test_what_waits_in_line_is_loaded_before_its_turn_if_there_is_room(engine, backend, path):
    async with engine.lease("tone@1", path, payer=PROBES), engine.lease("tone@2", path, payer=PROBES):
        waiting = asyncio.create_task(engine.lease("tone@3", path, payer=PROBES).__aenter__())
        assert await settled(lambda: engine.holds("tone@3")) and not waiting.done()
    await waiting


async def test_who_waits_in_line_hears_of_the_engine_s_end(engine, path):
    async with engine.lease("tone@1", path, payer=PROBES), engine.lease("tone@2", path, payer=PROBES):
        waiting = asyncio.create_task(engine.lease("tone@3", path, payer=PROBES).__aenter__())
        await asyncio.sleep(0.05)
        engine.fail(EngineUnavailable("gone"))
        with pytest.raises(EngineUnavailable, match="gone"):
            await waiting
    assert engine.leases == 0


async def test_a_tenant_s_further_requests_stand_behind_another_s_first_in_the_engine_s_queue(engine):
    async with (
        engine.lease(payer=Payer("flood", Cause.REQUEST, None)) as first,
        engine.lease(payer=Payer("flood", Cause.REQUEST, None)) as second,
        engine.lease(payer=Payer("other", Cause.REQUEST, None)) as other,
        engine.lease(payer=Payer("polite", Cause.REQUEST, None), priority=1) as polite,
        engine.lease(payer=Payer("server", Cause.REQUEST, None), priority=LOW_PRIORITY) as last,
    ):
        assert first.priority == other.priority < second.priority < polite.priority < last.priority < 1 << 63
