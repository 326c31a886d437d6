"""Whoever asks for much that blocks makes themselves wait."""

from __future__ import annotations

import asyncio
import threading
from contextvars import copy_context

import pytest

from serve.adapters.fair_threads import TENANT, FairThreads
from tests.support.waiting import eventually


@pytest.fixture
def threads():
    threads = FairThreads(4)
    yield threads
    threads.shutdown()


def submit(threads, tenant, call, *args):
    def within():
        TENANT.set(tenant)
        return threads.submit(call, *args)

    return copy_context().run(within)


def test_a_flood_of_one_tenant_leaves_threads_to_another_one(threads):
    held = threading.Event()
    flood = [submit(threads, "flood", held.wait) for _ in range(100)]
    assert submit(threads, "quiet", str, 1).result(60) == "1"
    assert submit(threads, None, str, 2).result(60) == "2"
    assert eventually(lambda: sum(future.running() for future in flood) == 2)
    held.set()
    assert all(future.result(60) for future in flood)


def test_tenants_take_turns_where_both_wait():
    threads, order, held = FairThreads(1), [], threading.Event()
    first = submit(threads, None, held.wait)
    for tenant in ("a", "a", "a", "b", "c", "b"):
        last = submit(threads, tenant, order.append, tenant)
    held.set()
    assert first.result(60)
    last.result(60)
    threads.shutdown()
    assert order == ["a", "b", "c", "a", "b", "a"]


def test_what_is_cancelled_before_its_turn_is_never_begun():
    threads, begun, held = FairThreads(1), [], threading.Event()
    threads.submit(held.wait)
    cancelled, other = threads.submit(begun.append, 1), threads.submit(begun.append, 2)
    assert cancelled.cancel()
    held.set()
    other.result(60)
    threads.shutdown()
    assert begun == [2]


def test_an_error_is_whoever_waits_for_its(threads):
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(60)
    assert threads.submit(str, 1).result(60) == "1"


async def test_it_is_what_to_thread_waits_in(threads):
    asyncio.get_running_loop().set_default_executor(threads)
    held = threading.Event()
    TENANT.set("flood")
    flood = [asyncio.create_task(asyncio.to_thread(held.wait)) for _ in range(20)]
    await asyncio.sleep(0.01)
    TENANT.set("quiet")
    assert await asyncio.to_thread(str, 1) == "1"
    for task in flood[10:]:
        task.cancel()
    held.set()
    assert len([one for one in await asyncio.gather(*flood, return_exceptions=True) if one is True]) == 10
    asyncio.get_running_loop().set_default_executor(FairThreads(1))
