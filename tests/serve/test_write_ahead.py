"""Files that several connections open at once."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest

from serve.files import write_ahead


@pytest.fixture
def writer(tmp_path):
    """A connection that is writing to a file that is not in WAL mode yet."""
    with closing(sqlite3.connect(tmp_path / "some.db", isolation_level=None, check_same_thread=False)) as database:
        database.execute("CREATE TABLE rows (row)")
        database.execute("BEGIN IMMEDIATE")
        yield database


@pytest.fixture
def other(tmp_path, writer):
    with closing(sqlite3.connect(tmp_path / "some.db", timeout=0)) as database:
        yield database


def test_who_turns_it_on_waits_until_another_has_written(writer, other):
    done = threading.Timer(0.2, writer.execute, ["COMMIT"])
    done.start()
    write_ahead(other, 30)
    done.join()
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    write_ahead(other, 0)  # it is on already


def test_its_patience_ends(writer, other):
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        write_ahead(other, 0.05)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_what_is_no_database_is_told_at_once(tmp_path):
    (tmp_path / "text.db").write_text("no database" * 100)
    with closing(sqlite3.connect(tmp_path / "text.db")) as database, pytest.raises(sqlite3.DatabaseError):
        write_ahead(database, 30)
