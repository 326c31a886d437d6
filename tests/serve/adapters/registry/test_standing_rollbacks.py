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
from tests.support.app import push_two, said, upload
from tests.support.waiting import settled


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


def test_a_version_that_another_server_made_live_again_stays(url):
    """The server was cut off meanwhile: it sees the same version live as before."""
    with filled(url) as registry, Registry(url) as other:
        registry.roll_back_here("tone", by="alarm")
        for version in (2, 3):
            other.promote("tone", version, by="somebody")
        registry.write_down()
        registry.refresh()
        assert other.live("tone").version == registry.live("tone").version == 3 and not registry.standing


def test_a_canary_that_another_server_began_again_stays(url):
    with filled(url) as registry, Registry(url) as other:
        registry.share("tone", "canary", 2, 0.5, by="test")
        registry.end_canary_here("tone", 2, by="referee")
        for weight in (0.0, 0.5):
            other.share("tone", "canary", 2, weight, by="somebody")
        registry.write_down()
        registry.refresh()
        assert registry.canary("tone").adapter.version == 2 and not registry.standing


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
    assert await settled(lambda: not registry.standing)
    await asyncio.to_thread(registry.refresh)
    assert await said(client) == first
    rows = (await client.get("/v1/adapters/tone")).json()["history"]
    assert [row["what"] for row in rows].count("rollback") == 1


def test_the_end_of_a_canary_holds_beside_a_rollback_until_both_are_written_down(url, tmp_path):
    file = tmp_path / "rollbacks.json"
    with filled(url, standing=file) as registry:
        registry.share("tone", "canary", 2, 0.5, by="test")
        registry.end_canary_here("tone", 2, by="referee", why="worse")
        registry.end_canary_here("tone", 2, by="referee", why="worse")
        assert registry.canary("tone") is None and len(registry.standing.all()) == 1
        registry.roll_back_here("tone", by="alarm", why="bad")
        registry.standing.keep()
        registry.refresh()
        assert (registry.canary("tone"), registry.live("tone").version) == (None, 2)
    with Registry(url, standing=file) as registry, Registry(url) as other:
        assert (registry.canary("tone"), registry.live("tone").version) == (None, 2), "a restart forgets nothing"
        assert (other.canary("tone").adapter.version, other.live("tone").version) == (2, 3)
        registry.write_down()
        other.refresh()
        assert (other.canary("tone"), other.live("tone").version) == (None, 2) and not registry.standing
        assert [(row["who"], row["what"]) for row in other.history("tone")][-2:] == [
            ("referee", "canary_end"),
            ("alarm", "rollback"),
        ]


def test_a_canary_that_somebody_else_started_meanwhile_stays(url):
    with filled(url) as registry, Registry(url) as other:
        registry.share("tone", "canary", 2, 0.5, by="test")
        registry.end_canary_here("tone", 2, by="referee")
        other.refresh()
        other.share("tone", "canary", 1, 0.5, by="somebody")
        registry.refresh()
        assert registry.canary("tone").adapter.version == 1
        registry.write_down()
        assert registry.canary("tone").adapter.version == 1 and not registry.standing


async def test_bad_canaries_end_in_seconds_while_the_database_is_locked_and_none_waits_for_another(
    client, make_adapter, config, monkeypatch
):
    monkeypatch.setattr(lifecycle, "REGISTRY_SECONDS", 0.3)
    parts = client._transport.app.state.parts
    names = [f"tone-{number}" for number in range(3)]
    for number, name in enumerate(names):
        await client.post("/v1/adapters", **upload(make_adapter(2 * number), name))
        await client.post("/v1/adapters", **upload(make_adapter(2 * number + 1), name, promote="false"))
        shared = await client.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.5})
        assert shared.status_code == 200, shared.text
    with closing(sqlite3.connect(config.data_dir / "registry.sqlite", isolation_level=None)) as elsewhere:
        elsewhere.execute("BEGIN IMMEDIATE")
        results = await asyncio.gather(*(parts.automatic_rollback.rollback(name, 2, "slower", {}) for name in names))
        assert [result.outcome.value for result in results] == ["canary_ended"] * 3
        assert not any(parts.registry.canary(name) for name in names)
        assert len(parts.registry.standing.all()) == 3
        elsewhere.execute("ROLLBACK")
    assert await settled(lambda: not parts.registry.standing)
    for name in names:
        rows = (await client.get(f"/v1/adapters/{name}")).json()["history"]
        assert [row["what"] for row in rows].count("canary_end") == 1
