from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serve.engine import SETTLE, Engine, Phase
from serve.errors import AdapterRejected, EngineUnavailable


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


async def test_a_waiter_that_leaves_does_not_stop_the_load_of_the_others(engine, backend, path):
    leaving = asyncio.create_task(engine.ensure("tone@1", path))
    staying = asyncio.create_task(engine.ensure("tone@1", path))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    assert (backend.loads, engine.leases) == (1, 0)


async def test_a_retired_adapter_leaves_with_its_last_lease(engine, backend, path):
    async with engine.lease("tone@1", path):
        async with engine.lease("tone@1", path):
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
    async with engine.lease("tone@0", path):
        for number in range(1, 10):
            await engine.ensure(f"tone@{number}", path)
        await asyncio.sleep(3 * SETTLE)
        assert sorted(backend.held) == ["tone@0", "tone@7", "tone@8", "tone@9"]


async def test_an_engine_that_is_not_ready_says_so_and_counts_no_lease(backend):
    engine = Engine(backend)
    with pytest.raises(EngineUnavailable, match="starting"):
        async with engine.lease():
            pass
    assert engine.leases == 0


async def test_a_dead_backend_makes_the_engine_fail(engine, backend):
    backend.dead = True
    with pytest.raises(EngineUnavailable):
        async with engine.lease("tone@1", Path("/nowhere")):
            pass
    assert engine.phase is Phase.FAILED
