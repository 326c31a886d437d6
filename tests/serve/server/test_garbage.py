"""A full collection waits for a quiet moment, and comes at last without one."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest

from serve.server.garbage import FEW, SOME, collect_in_quiet
from tests.support.waiting import settled


class Cycle:
    def __init__(self) -> None:
        self.own = self


async def test_what_the_start_left_behind_is_not_kept():
    gc.collect()
    gone = weakref.ref(Cycle())
    assert gone() is not None
    collecting = asyncio.create_task(collect_in_quiet(lambda: FEW + 1))
    try:
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        collecting.cancel()
        with suppress(asyncio.CancelledError):
            await collecting
        gc.unfreeze()


@pytest.mark.parametrize(("connections", "latest", "goes"), [(FEW, 60, True), (FEW + 1, 60, False), (FEW + 1, 0, True)])
async def test_old_garbage_goes_in_a_quiet_moment_or_at_the_latest(connections, latest, goes):
    before = gc.get_threshold()
    kept = Cycle()
    gc.collect()  # it is old
    gone = weakref.ref(kept)
    collecting = asyncio.create_task(collect_in_quiet(lambda: connections, look=0.01, latest=latest))
    try:
        await asyncio.sleep(0)
        assert gc.get_threshold()[2] > 1000 and gc.get_freeze_count()
        gc.unfreeze()
        del kept
        if goes:
            assert await settled(lambda: gone() is None)
        else:
            await asyncio.sleep(0.1)
            assert gone() is not None
    finally:
        collecting.cancel()
        with suppress(asyncio.CancelledError):
            await collecting
    assert gc.get_threshold() == before


async def test_what_the_allocator_has_free_is_given_back_once_memory_has_grown():
    sizes, given = iter([0, SOME, SOME + 1, 5, 5 + SOME]), []
    last = [0]

    def resident():
        last[0] = next(sizes, last[0])
        return last[0]

    collecting = asyncio.create_task(
        collect_in_quiet(lambda: FEW, look=0.01, resident=resident, give_back=lambda: given.append(last[0]))
    )
    try:
        assert await settled(lambda: last[0] == 5 + SOME)
        assert given == [0, SOME + 1], "what the start left, and once it is more; no more once it is gone"
    finally:
        collecting.cancel()
        with suppress(asyncio.CancelledError):
            await collecting
        gc.unfreeze()
