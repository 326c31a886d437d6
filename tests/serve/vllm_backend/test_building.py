"""A server that stops while an engine is built waits for no thread, and leaves no process."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time

import pytest

from serve.vllm_backend import building
from serve.vllm_backend.building import built
from tests.support.waiting import settled

context = multiprocessing.get_context("spawn")


def hang():
    time.sleep(600)


async def test_what_is_built_is_returned_and_what_goes_wrong_raised():
    assert await built(lambda: 7, print) == 7
    with pytest.raises(ValueError, match="no such model"):
        await built(lambda: int("no such model"), print)


async def test_a_build_that_is_abandoned_loses_its_processes_and_nobody_elses():
    other = context.Process(target=hang, daemon=True)
    other.start()
    mine, discarded = [], []

    def build():
        process = context.Process(target=hang, daemon=True)
        process.start()
        mine.append(process)
        process.join()
        raise RuntimeError("the engine's process ended")

    building_ = asyncio.create_task(built(build, discarded.append))
    assert await settled(lambda: mine and mine[0].is_alive())
    building_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building_
    assert not mine[0].is_alive() and other.is_alive() and not discarded
    other.kill()


async def test_a_build_that_nothing_ends_is_not_waited_for_and_its_engine_discarded(monkeypatch):
    monkeypatch.setattr(building, "GIVE_UP_SECONDS", 0.1)
    go, discarded = threading.Event(), []

    def build():
        go.wait(30)
        return "an engine"

    task = asyncio.create_task(built(build, discarded.append))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert not discarded
    go.set()
    assert await settled(lambda: discarded == ["an engine"])
