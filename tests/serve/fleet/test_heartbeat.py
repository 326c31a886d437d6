"""One row a server, one decision who lives: by whether the row changes, whatever clocks say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy import delete, event, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import replicas
from serve.fleet import heartbeat
from serve.fleet.heartbeat import MISSED, Heartbeat, ThisServer
from serve.fleet.membership import Membership, Report


class Here:
    """A server that serves."""

    load, seats = 1.0, 16.0

    def report(self):
        return Report(slots=8, max_rank=16, load=self.load, held=("tone",))


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        yield registry


@pytest.fixture
def join(registry):
    """`join("a")` is a server of this registry that shares homes, `join("a", homes=False)` one that does not."""

    def beating(id, homes=True):
        member = Membership(id, f"http://{id}:8000", ["base"], Here()) if homes else None
        beat = Heartbeat(registry, ThisServer(id, f"node of {id}"), lambda: "ready", *([member] if member else []))
        return SimpleNamespace(beat=beat.beat, close=beat.close, heartbeat=beat, membership=member)

    return beating


def living(server):
    return [row["id"] for row in server.heartbeat.living()]


def peers(server):
    return [peer.id for peer in server.membership.peers]


async def rounds(count, *servers):
    for _ in range(count):
        for server in servers:
            await server.beat()


async def test_whom_a_server_lists_and_whom_it_sends_to_are_the_same(join):
    one, other, third = join("one"), join("other"), join("third", homes=False)
    await rounds(3, one, other, third)
    assert living(one) == living(other) == living(third) == ["one", "other", "third"]
    assert peers(one) == ["other"] and peers(other) == ["one"], "one without an address is no home"
    # It stands still: neither list has it any more, from the same beat on.
    await third.close()
    await rounds(MISSED, one)
    assert (living(one), peers(one)) == (["one", "other"], ["other"])
    await one.beat()
    assert (living(one), peers(one)) == (["one"], [])
    await rounds(1, other, one)
    assert (living(one), peers(one)) == (["one", "other"], ["other"])
    await other.close()
    await one.beat()
    assert (living(one), peers(one)) == (["one"], [])


@pytest.mark.parametrize("behind", [-7200.0, 7200.0])
async def test_a_clock_that_is_hours_off_hides_nobody(join, monkeypatch, behind):
    one, other = join("one"), join("other")
    now = [1e9]
    monkeypatch.setattr(heartbeat.time, "time", lambda: now[0])
    for _ in range(2):
        now[0] += 1
        await one.beat()
        now[0] += behind
        await other.beat()
        now[0] -= behind
    await one.beat()
    assert living(one) == living(other) == ["one", "other"]
    assert all(row["seen_seconds_ago"] < 60 for row in one.heartbeat.living())


async def test_a_beat_is_one_row_and_two_transactions(join, registry):
    one = join("one")
    await one.beat()
    statements = []
    event.listen(registry._engine, "before_cursor_execute", lambda c, cursor, sql, *rest: statements.append(sql))
    await one.beat()
    assert [sql.split()[0] for sql in statements if not sql.startswith("BEGIN")] == ["UPDATE", "SELECT"]


async def test_a_row_that_nobody_writes_any_more_goes_in_the_end(join, registry, monkeypatch):
    monkeypatch.setattr(heartbeat, "FORGOTTEN", 20)
    one, other = join("one"), join("other")
    await rounds(2, one, other)
    await rounds(22, one)
    with registry.reading() as connection:
        assert connection.execute(select(replicas.c.id)).all() == [("one",)]
    await rounds(2, other, one)
    assert peers(one) == ["other"], "it came back"


async def test_a_server_of_the_release_before_is_listed_and_no_home(join, registry):
    one = join("one")
    for seen in (1.0, 2.0):
        with registry.adding() as connection:
            connection.execute(delete(replicas).where(replicas.c.id == "old"))
            row = {"id": "old", "node": "there", "phase": "ready", "generation": 0, "seen": seen}
            connection.execute(insert(replicas).values(row))
        await one.beat()
    assert (living(one), peers(one)) == (["old", "one"], [])


async def test_a_report_that_this_release_cannot_read_is_no_home(join, registry, monkeypatch):
    one, other = join("one"), join("other")
    monkeypatch.setattr(other.membership, "told", lambda: {"address": "http://other:8000", "report": '{"slots": "x"}'})
    await rounds(3, one, other)
    assert (living(one), peers(one)) == (["one", "other"], [])
