"""Servers of the release before and of this one share a database, while one takes the place of the other and back."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import Boolean, Float, Integer, insert, inspect, select, update

from serve.adapters.registry import database
from serve.adapters.registry.registry import Registry
from serve.auth.keys import Keys
from serve.auth.rate_limits import Limits
from tests.support.registry import digest, push
from tests.support.release_before import SCHEMA, make_before, tables_before


@pytest.fixture(params=["this release made it", "the release before made it"])
def shared(request, url):
    """The URL of a database that this release has opened."""
    if request.param.startswith("the release before"):
        make_before(url)
    Registry(url).close()
    return url


def value(column):
    """Something that fits: every number is 1, every text is the same, so that rows belong together."""
    if isinstance(column.type, Boolean):
        return True
    return 1.0 if isinstance(column.type, Float) else 1 if isinstance(column.type, Integer) else "[]"


def test_every_statement_of_the_release_before_works_on_what_this_one_opened(shared):
    tables = tables_before()
    engine = database.opened(shared)
    with engine.begin() as connection:
        there = connection.scalar(select(tables.tables["schema_version"].c.version))
        assert there <= SCHEMA, "it refuses to start"
        ordered = [table for table in tables.sorted_tables if table.name != "schema_version"]
        for table in ordered:
            row = {column.name: value(column) for column in table.columns}
            connection.execute(insert(table).values(row))
            some = {column.name: value(column) for column in table.columns if not column.primary_key}
            assert connection.execute(update(table).values(some)).rowcount == 1
            assert tuple(connection.execute(select(table)).one()) == tuple(row.values())
        for table in reversed(ordered):
            assert connection.execute(table.delete()).rowcount == 1
    engine.dispose()


def test_what_the_release_before_needs_is_never_left_out(url, tmp_path):
    """A column that had to be filled has to be filled still: databases of then hold this release to it."""
    make_before(url)
    Registry(url).close()
    Registry(f"sqlite:///{tmp_path}/new.db").close()
    needed = []
    for place in (url, f"sqlite:///{tmp_path}/new.db"):
        engine = database.opened(place)
        look = inspect(engine)
        needed.append(
            {
                (name, column["name"])
                for name in tables_before().tables
                for column in look.get_columns(name)
                if not column["nullable"]
            }
        )
        engine.dispose()
    assert needed[0] == needed[1]


def test_each_release_reads_what_the_other_wrote(shared):
    tables = tables_before().tables
    names, history, keys = tables["names"], tables["history"], tables["keys"]
    with Registry(shared) as registry:
        for number in (1, 2):
            push(registry, "tone", number)
        registry.share("tone", "canary", 1, 0.5, by="ana")
        registry.alias("tone", "stable", 1, by="ana")
        held = Keys(registry)
        held.create("acme", "ci", ["inference"], Limits(requests_per_minute=3))
        with registry.reading() as connection:
            row = connection.execute(select(names)).one()
            assert (row.live, json.loads(row.trail), row.canary_version, row.canary_weight) == (2, [1], 1, 0.5)
            assert json.loads(row.aliases) == {"stable": 1}
            (limits,) = connection.execute(select(keys.c.limits)).one()
            assert json.loads(limits) == {"requests_per_minute": 3}, "it knows no other limits, and would not start"
        # As it rolls back.
        with registry.transaction() as connection:
            back = {"live": 1, "trail": "[]", "canary_version": None, "canary_weight": None}
            connection.execute(update(names).where(names.c.id == row.id).values(back))
            entry = {"name_id": row.id, "who": "bo", "what": "rollback", "why": "", "when": 1.0}
            connection.execute(insert(history).values(**entry, from_version=2, to_version=1))
        registry.refresh()
        assert registry.live("tone").digest == digest(1) and registry.canary("tone") is None
        assert registry.history("tone")[-1]["who"] == "bo"


def test_a_key_with_a_limit_and_a_scope_of_a_later_release_is_read(shared):
    with Registry(shared) as registry:
        key, _ = Keys(registry).create("acme", "ci", ["inference"], Limits(requests_per_minute=3))
        keys = tables_before().tables["keys"]
        with registry.transaction() as connection:
            later = {"limits": '{"requests_per_minute": 3, "sorrow": 7}', "scopes": '["inference", "sing"]'}
            connection.execute(update(keys).values(later))
        (read,) = Keys(registry).all()
        assert (read.limits, read.scopes) == (key.limits, key.scopes)


def test_a_database_is_brought_up_once_and_stays_as_it_is(url):
    make_before(url)
    columns = []
    for _ in range(2):
        Registry(url).close()
        engine = database.opened(url)
        look = inspect(engine)
        columns.append({name: [column["name"] for column in look.get_columns(name)] for name in look.get_table_names()})
        engine.dispose()
    assert columns[0] == columns[1] and "report" in columns[0]["replicas"] and "key" in columns[0]["golden_sets"]
