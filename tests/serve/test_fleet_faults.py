"""Two servers whose PostgreSQL is cut off, or stands still: answers go on, and nothing is lost.

`make fleet` does this and more to processes, and to the real engine.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sqlalchemy.engine import make_url

from tests.support.app import ask, push_two
from tests.support.backend import FakeBackend
from tests.support.postgres import database
from tests.support.proxy import Proxy, unix
from tests.support.waiting import settled


@pytest.fixture
def way(postgres):
    """A proxy before the database, and the URL through it."""
    url = make_url(database(postgres))
    with Proxy(unix(f"{url.query['host']}/.s.PGSQL.5432")) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port, query={})
        yield SimpleNamespace(url=through.render_as_string(hide_password=False), proxy=proxy)


@pytest.fixture
async def pair(connect, config, tiny_model, tmp_path, way, make_adapter):
    """Two servers; version 2 of `tone` is live, and version 1 was before it."""
    both = replace(config, registry=way.url, blobs=f"file://{tmp_path}/shared")
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(2):
            own = replace(both, data_dir=tmp_path / f"data-{number}")
            clients.append(await stack.enter_async_context(connect(own, FakeBackend(str(tiny_model)))))
        one, other = clients
        ids = await push_two(one, make_adapter)
        assert (await other.post("/v1/adapters/tone/promote", json={"version": 2})).status_code == 200
        for client in clients:
            assert (await ask(client, "tone")).json() == {"model": ids[1]}
        yield SimpleNamespace(one=one, other=other, clients=clients, ids=ids)


@asynccontextmanager
async def fault(proxy, mode):
    await asyncio.to_thread(proxy.become, mode)
    try:
        yield
    finally:
        await asyncio.to_thread(proxy.become, "pass")


@asynccontextmanager
async def traffic(pair):
    """Clients of both servers all the while: whatever was no answer."""
    bad = []

    async def client(number):
        while True:
            answer = await ask(pair.clients[number % 2], "tone")
            if answer.status_code != 200:
                bad.append(answer.text)
            await asyncio.sleep(0.02)

    asking = [asyncio.create_task(client(number)) for number in range(4)]
    try:
        yield bad
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def troubled(client):
    return "registry" in client._transport.app.state.parts.health.degraded


async def promoted(client, version):
    return (await client.post("/v1/adapters/tone/promote", json={"version": version})).status_code == 200


@pytest.mark.parametrize("mode", ["refusing", "frozen"])
async def test_without_the_database_answers_go_on_and_a_rollback_holds_where_it_was_asked_for(pair, way, mode):
    async with traffic(pair) as bad:
        async with fault(way.proxy, mode):
            assert await settled(lambda: all(map(troubled, pair.clients)))
            told = await pair.one.post("/v1/adapters/tone/rollback")
            assert told.status_code == 200, told.text
            assert (await ask(pair.one, "tone")).json() == {"model": pair.ids[0]}
            assert (await ask(pair.other, "tone")).json() == {"model": pair.ids[1]}
        assert await settled(lambda: not any(map(troubled, pair.clients)))
        registry = pair.one._transport.app.state.parts.registry
        assert await settled(lambda: not registry.standing), "the rollback was not written down"
        for client in pair.clients:
            assert (await ask(client, "tone")).json() == {"model": pair.ids[0]}
        assert await promoted(pair.other, 2)
        for client in pair.clients:
            assert (await ask(client, "tone")).json() == {"model": pair.ids[1]}
    assert not bad, bad[:3]
