"""No background task ends unseen: it is started again, /ready says so, and a metric counts it."""

from __future__ import annotations

import asyncio

import pytest

from serve.api import background_tasks
from serve.api.background_tasks import BackgroundTasks
from tests.support.waiting import settled


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(background_tasks, "RETRY_SECONDS", 0.01)


@pytest.fixture
async def background():
    tasks = BackgroundTasks()
    yield tasks
    await tasks.stop()


def failures(tasks, name):
    (family,) = tasks.collect()
    return {sample.labels["task"]: sample.value for sample in family.samples}[name]


@pytest.mark.parametrize("how", ["raises", "returns"])
async def test_a_task_that_ends_is_started_again_and_counted(background, soon, how):
    runs = []

    async def run():
        runs.append(1)
        if len(runs) > 2:
            await asyncio.Event().wait()
        if how == "raises":
            raise RuntimeError("no")

    background.start("poll", run)
    assert await settled(lambda: len(runs) == 3)
    assert failures(background, "poll") == 2
    assert list(background.problems) == ["poll"]


async def test_a_task_that_has_run_for_a_while_since_is_well_again(soon):
    now = [0.0]
    tasks, runs = BackgroundTasks(lambda: now[0]), []

    async def run():
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("no")
        await asyncio.Event().wait()

    tasks.start("poll", run)
    assert await settled(lambda: len(runs) == 2)
    assert tasks.problems == {"poll": "RuntimeError: no"}
    now[0] = background_tasks.WELL_SECONDS + 1
    assert tasks.problems == {}
    await tasks.stop()


async def test_the_wait_before_a_new_start_doubles_up_to_a_bound(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 8:
            await asyncio.Event().wait()

    monkeypatch.setattr(background_tasks.asyncio, "sleep", sleep)
    tasks = BackgroundTasks(lambda: 0.0)

    async def run():
        raise RuntimeError("no")

    tasks.start("poll", run)
    while len(waits) < 8:
        await asyncio.wait([asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(None, lambda: None))])
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    await tasks.stop()


async def test_a_task_that_fails_shows_in_ready_and_in_the_metrics(client, monkeypatch, soon):
    parts = client._transport.app.state.parts
    assert "degraded" not in (await client.get("/ready")).json()

    async def run():
        raise RuntimeError("the disk is gone")

    parts.background.start("toy", run)
    assert await settled(lambda: parts.health.degraded)
    ready = await client.get("/ready")
    assert ready.status_code == 200
    assert ready.json()["degraded"] == {"toy": "RuntimeError: the disk is gone"}
    assert 'loradock_background_task_failures_total{task="toy"}' in (await client.get("/metrics")).text
