"""Servers of this release take the place of those of the release before, one by one, under traffic."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from sqlalchemy import select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import history, usage
from tests.support.app import ask, upload
from tests.support.backend import FakeBackend
from tests.support.release_before import ServerBefore, make_before
from tests.support.waiting import settled

CLIENTS = 4


class Traffic:
    """Clients that ask the servers in turn, and hold each answer against what was live all the while."""

    def __init__(self, before, ids):
        self.servers = []
        self.answered = 0
        self.wrong = []
        self._before = before
        self._ids = ids

    async def ask(self, number):
        turn = number
        while True:
            turn += 1
            live = self._before.acknowledged
            rounds = self._before.promotions
            answer = await ask(self.servers[turn % len(self.servers)], "tone")
            self.answered += 1
            if answer.status_code != 200:
                self.wrong.append(answer.text)
                continue
            was_live = live and (live, rounds) == (self._before.begun, self._before.promotions)
            if was_live and answer.json()["model"] != self._ids[live - 1]:
                self.wrong.append((live, answer.json()))

    async def more(self, count):
        target = self.answered + count
        assert await settled(lambda: self.answered >= target)


@pytest.fixture
def server(connect, config, tiny_model, tmp_path, url):
    """`server(1)` is a server of this release on the common database."""

    def started(number):
        own = replace(config, registry=url, blobs=f"file://{tmp_path}/shared", data_dir=tmp_path / f"data-{number}")
        return connect(own, FakeBackend(str(tiny_model)))

    return started


async def test_a_rolling_upgrade_under_traffic_loses_nothing(server, url, make_adapter):
    await asyncio.to_thread(make_before, url)
    async with AsyncExitStack() as later:
        async with server(1) as first:
            pushed = [await first.post("/v1/adapters", **upload(make_adapter(seed))) for seed in (0, 1)]
            with ServerBefore(url, "tone") as before:
                traffic = Traffic(before, [push.json()["id"] for push in pushed])
                traffic.servers = [first]
                clients = [asyncio.create_task(traffic.ask(number)) for number in range(CLIENTS)]
                await traffic.more(60)
                second = await later.enter_async_context(server(2))
                traffic.servers = [first, second]
                await traffic.more(60)
                traffic.servers = [second]
                await traffic.more(2 * CLIENTS)  # none is at the first any more
                living = second._transport.app.state.parts.heartbeat.living_ids
                assert await settled(lambda: "before" in living())
        # The first was stopped, and the one of the release before: the second goes on alone.
        await traffic.more(60)
        for client in clients:
            client.cancel()
        assert not traffic.wrong, traffic.wrong[:3]
        live = traffic._ids[before.acknowledged - 1]
        assert (await ask(second, "tone")).json() == {"model": live}
    assert before.promotions > 2
    with Registry(url) as registry, registry.reading() as connection:
        counted = connection.scalar(select(usage.c.requests).where(usage.c.day == before.day))
        told = connection.execute(select(history.c.id).where(history.c.who == "before")).all()
    assert before.promotions <= counted <= before.promotions + 1
    assert len(told) >= before.promotions - 1
    # One release back: what this release has done keeps nobody from starting.
    with ServerBefore(url, "tone") as again:
        assert await settled(lambda: again.promotions > 1)
