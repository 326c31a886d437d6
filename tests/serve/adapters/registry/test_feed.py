"""What another server changed is read by itself, and comes to the same as reading everything."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError

from serve.adapters.registry import database, snapshot
from serve.adapters.registry.registry import Registry
from serve.errors import Conflict, EngineUnavailable, NotFound
from tests.support import postgres as postgresql
from tests.support.registry import push
from tests.support.waiting import eventually


@pytest.fixture
def pair(url):
    """Two servers on one registry."""
    with Registry(url) as one, Registry(url) as other:
        yield one, other


@contextmanager
def statements(registry):
    """The queries that a server makes meanwhile."""
    seen: list[str] = []

    def note(connection, cursor, statement, *rest):
        seen.append(statement)

    event.listen(registry._engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(registry._engine, "before_cursor_execute", note)


def test_one_change_costs_others_the_names_that_it_changed(pair):
    one, other = pair
    for number in range(20):
        push(one, f"adapter-{number}", number)
    assert other.refresh()
    before = other.frozen()
    one.note("adapter-3", "drift", 1, by="drift")
    push(one, "adapter-7", 99)
    with statements(other) as seen:
        assert other.refresh()
    assert other.changed_since(before) == {"adapter-3", "adapter-7"}
    queries = [statement for statement in seen if statement.startswith("SELECT")]
    assert len(queries) <= 3
    # Whatever reads names or versions says which.
    assert all("WHERE" in query for query in queries)
    with statements(other) as seen:
        assert not other.refresh()
    assert not any("FROM names" in statement or "FROM versions" in statement for statement in seen)


def test_an_own_change_is_read_by_nobody_again(pair):
    one, _ = pair
    push(one, "pirate", 1)
    before = one.frozen()
    with statements(one) as seen:
        push(one, "tone", 2)
    assert one.changed_since(before) == {"tone"}
    assert not any("history.id >" in statement for statement in seen)


@pytest.mark.parametrize("seed", range(2))
def test_following_is_as_reading_everything(pair, url, seed, monkeypatch):
    one, other = pair
    monkeypatch.setattr(snapshot, "MOST_FOLLOWED", 3)
    rng = random.Random(seed)
    names = [f"a{number}" for number in range(5)]

    def change(registry):
        name, version = rng.choice(names), rng.randrange(1, 4)
        return rng.choice((
            lambda: push(registry, name, rng.randrange(40), promote=rng.random() < 0.5),
            lambda: registry.promote(name, version, by="bo"),
            lambda: registry.rollback(name, by="bo"),
            lambda: registry.share(name, rng.choice(("canary", "shadow")), version, 0.5, by="bo"),
            lambda: registry.pin(name, by="bo"),
            lambda: registry.alias(name, "stable", version, by="bo"),
            lambda: registry.tag(name, version, ["good"], by="bo"),
            lambda: registry.publish(name, rng.random() < 0.5, by="bo"),
            lambda: registry.unload(name, by="bo"),
            lambda: registry.delete(name, rng.choice((None, version)), by="bo", force=True),
            lambda: registry.rename(name, rng.choice(names), by="bo"),
            lambda: registry.end_move(name, by="bo"),
        ))  # fmt: skip

    for _ in range(80):
        registry = rng.choice((one, other))
        try:
            change(registry)()
        except (Conflict, NotFound):
            pass
        if rng.random() < 0.3:
            follower = rng.choice((one, other))
            follower.refresh()
            with Registry(url) as whole:
                assert follower._snapshot == whole._snapshot


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_server_that_stands_still_in_a_change_stops_nobody(url, monkeypatch):
    """Stopped with the lock in its hands: it loses the change, before others give up. Reads never waited."""
    monkeypatch.setattr(database, "IDLE_IN_CHANGE", 4_000)
    with Registry(url) as one, Registry(url) as other:
        push(one, "pirate", 1)
        push(one, "pirate", 2)
        frozen = one._engine.connect()
        frozen.execute(text("LOCK TABLE history IN EXCLUSIVE MODE"))
        promoted = threading.Thread(target=other.promote, args=("pirate", 1), kwargs={"by": "bo"})
        promoted.start()
        time.sleep(0.2)  # it waits for the lock by now
        # Neither a look at what others did nor a table of one's own waits for the change.
        other.refresh()
        with other.adding() as connection:
            connection.execute(text("SELECT 1"))
        assert promoted.is_alive()
        promoted.join(30)
        assert not promoted.is_alive()
        with pytest.raises(DBAPIError):
            frozen.execute(text("SELECT 1"))
        frozen.invalidate()
        frozen.close()
        assert other.live("pirate").version == 1
        assert one.refresh() and one.live("pirate").version == 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_who_waits_too_long_for_a_lock_is_told(url, monkeypatch):
    monkeypatch.setattr(database, "LOCK_PATIENCE", 300)
    with Registry(url) as one:
        push(one, "pirate", 1)
        busy = create_engine(url).connect()
        with busy.begin():
            busy.execute(text("LOCK TABLE history IN EXCLUSIVE MODE"))
            with pytest.raises(EngineUnavailable, match="lock timeout"):
                one.promote("pirate", 1, by="bo")
        busy.close()
        assert one.promote("pirate", 1, by="bo").version == 1


def test_a_server_that_is_quiet_again_holds_two_connections(postgres):
    """With five, the twentieth server found none left of PostgreSQL's hundred."""
    url = postgresql.database(postgres)
    together, crowd = threading.Barrier(8), "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with Registry(url) as registry, create_engine(url, isolation_level="AUTOCOMMIT").connect() as watching:

        def read():
            with registry.reading() as connection:
                together.wait(60)
                connection.execute(text("SELECT 1"))

        readers = [threading.Thread(target=read) for _ in range(8)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert eventually(lambda: watching.scalar(text(crowd)) - 1 <= 2), watching.scalar(text(crowd))
