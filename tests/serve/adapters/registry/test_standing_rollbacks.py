"""A rollback holds at once, also while the database is slow or gone, and is written down once that answers again."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry
from serve.errors import Conflict, EngineUnavailable
from serve.rollout import lifecycle
from tests.support.app import push_two, said, settled


def filled(url, **more):
    registry = Registry(url, **more)
    for number in (1, 2, 3):
        registry.add("tone", Inspection(8, None, ("q",), 1, 2), f"{number:064x}", by="test")
    return registry


def test_it_holds_over_what_the_database_says_until_it_is_written_down(url, tmp_path):
    file = tmp_path / "rollbacks.json"
    with filled(url, standing=file) as registry:
        assert registry.roll_back_here("tone", by="alarm", why="bad").version == 2
        registry.standing.keep()
        registry.refresh()
        assert registry.live("tone").version == 2
        with pytest.raises(EngineUnavailable, match="waits for it already"):
            registry.roll_back_here("tone", by="alarm")
    with Registry(url, standing=file) as registry, Registry(url) as other:
        assert registry.live("tone").version == 2, "a restart forgets nothing"
        assert other.live("tone").version == 3
        registry.write_down()
        other.refresh()
        assert other.live("tone").version == 2 and not registry.standing
        assert [(row["who"], row["what"]) for row in other.history("tone")][-1] == ("alarm", "rollback")


def test_what_another_server_changed_first_holds(url):
    with filled(url) as registry, Registry(url) as other:
        registry.roll_back_here("tone", by="alarm")
        other.promote("tone", 1, by="somebody")
        registry.write_down()
        registry.refresh()
        assert registry.live("tone").version == 1 and not registry.standing


def test_it_follows_an_adapter_that_another_server_has_renamed(url):
    with filled(url) as registry, Registry(url) as other:
        registry.roll_back_here("tone", by="alarm")
        other.rename("tone", "voice", by="somebody")
        registry.refresh()
        assert registry.live("voice").version == 2
        registry.write_down()
        other.refresh()
        assert other.live("voice").version == 2 and not registry.standing


def test_it_looks_at_what_is_expected_and_needs_an_earlier_version(url):
    with filled(url) as registry:
        with pytest.raises(Conflict):
            registry.roll_back_here("tone", by="alarm", expected=1)
        registry.delete("tone", 1, by="test")
        registry.delete("tone", 2, by="test")
        with pytest.raises(Conflict, match="no earlier version"):
            registry.roll_back_here("tone", by="alarm")


async def test_a_rollback_is_done_in_seconds_while_the_database_is_locked(client, make_adapter, config, monkeypatch):
    monkeypatch.setattr(lifecycle, "REGISTRY_SECONDS", 0.3)
    first, _ = await push_two(client, make_adapter)
    assert (await client.post("/v1/adapters/tone/promote", json={"version": 2})).status_code == 200
    with closing(sqlite3.connect(config.data_dir / "registry.sqlite", isolation_level=None)) as elsewhere:
        elsewhere.execute("BEGIN IMMEDIATE")
        answer = await client.post("/v1/adapters/tone/rollback", json={"expected_version": 2})
        assert answer.status_code == 200 and answer.json()["version"] == 1, answer.text
        assert await said(client) == first
        assert "rollback" in (await client.get("/ready")).json()["degraded"]
        elsewhere.execute("ROLLBACK")
    registry = client._transport.app.state.parts.registry
    assert await settled(lambda: not registry.standing, 20)
    await asyncio.to_thread(registry.refresh)
    assert await said(client) == first
    rows = (await client.get("/v1/adapters/tone")).json()["history"]
    assert [row["what"] for row in rows].count("rollback") == 1
