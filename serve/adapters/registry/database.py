"""The database that holds the registry's tables, and the way from an older schema to this one.

SQLite in WAL mode or, by its URL, PostgreSQL. Servers of two releases share it while one takes the place of the other:
what is missing is added so that the release before does not mind, and what nobody uses any more goes a release later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateColumn

from serve.adapters.registry.tables import OLDEST, SCHEMA, metadata, schema_version
from serve.errors import ConfigError, EngineUnavailable, LoradockError, OutOfSpace
from serve.files import write_ahead
from serve.names import shown

# A database that does not answer is an error after seconds, not after the kernel's quarter of an hour.
LIBPQ_PATIENCE = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# PostgreSQL's own limits, in milliseconds. A server that stands still in the middle of a change (stopped, swapped out,
# cut off) loses it, and with it the lock, before those that wait for the lock give up.
IDLE_IN_CHANGE = 5_000
LOCK_PATIENCE = 8_000
STATEMENT_PATIENCE = 60_000
# Connections of a server that is quiet, and of one that has much to do. PostgreSQL lets 100 in by default.
QUIET, BUSY = 2, 10
SQLITE_PATIENCE = 15  # seconds that one of SQLite's writers waits for another
# Whoever prepares a PostgreSQL database holds this lock: any number that is the same in every loradock.
PREPARING = 0x10AD0C4
# Every column that is there: its table, its name, and how long a text it takes.
_COLUMNS = {
    "sqlite": "SELECT t.name, c.name, NULL FROM sqlite_master t JOIN pragma_table_info(t.name) c "
    "WHERE t.type = 'table'",
    "postgresql": "SELECT table_name, column_name, character_maximum_length FROM information_schema.columns "
    "WHERE table_schema = current_schema()",
}
# Those of clients beside the one that asks, and those that are not kept for superusers.
_CONNECTIONS = (
    "SELECT (SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL) - 1, "
    "current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
)


def opened(url: str) -> Engine:
    """The database behind SQLAlchemy's URL; ConfigError when there can be none."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            patience = libpq_patience() if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
            defaults = {key: value for key, value in patience.items() if key not in parsed.query}
            pool = {"pool_size": QUIET, "max_overflow": BUSY - QUIET, "pool_pre_ping": True}
            return create_engine(parsed, connect_args=defaults, **pool)
        if not parsed.database or parsed.database == ":memory:":
            engine = create_engine(parsed, poolclass=StaticPool, connect_args={"check_same_thread": False})
        else:
            # SQLite would create it readable by everybody; its -wal and -shm take the mode of the file.
            os.close(os.open(parsed.database, os.O_RDWR | os.O_CREAT, 0o600))
            engine = create_engine(parsed)
    except (ArgumentError, NoSuchModuleError, ImportError, OSError) as unusable:
        raise ConfigError(
            f"the registry cannot be opened ({reason(unusable)}); give a URL such as sqlite:///registry.db or "
            "postgresql+psycopg://user@host/loradock"
        ) from unusable

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the transactions are ours: see `_begin`
        connection.execute(f"PRAGMA busy_timeout={1000 * SQLITE_PATIENCE}").close()
        write_ahead(connection, SQLITE_PATIENCE)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Take the write lock before reading what the write depends on; a later upgrade could fail.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def connections(url: str) -> tuple[int, int] | None:
    """How many are open on a PostgreSQL server, and how many it lets in; None of another database. It makes no table.

    ConfigError, if it cannot be asked.
    """
    if not url.startswith("postgresql"):
        return None
    engine = opened(url)
    try:
        with engine.connect() as connection:
            row = connection.execute(text(_CONNECTIONS)).one()
    except DBAPIError as error:
        raise ConfigError(f"the registry does not answer: {reason(error)}") from error
    finally:
        engine.dispose()
    return int(row[0]), int(row[1])


def libpq_patience() -> dict[str, str]:
    """What a connection is opened with, where its URL does not say it otherwise."""
    limits = {
        "idle_in_transaction_session_timeout": IDLE_IN_CHANGE,
        "lock_timeout": LOCK_PATIENCE,
        "statement_timeout": STATEMENT_PATIENCE,
    }
    return {**LIBPQ_PATIENCE, "options": " ".join(f"-c {name}={value}" for name, value in limits.items())}


def prepare(engine: Engine) -> None:
    """Add what is missing; ConfigError for a database that this release cannot work with."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Two servers that start at once over an empty database would both make the tables: one waits for the other.
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(select(func.pg_advisory_xact_lock(PREPARING)))
        metadata.create_all(connection)
        oldest = connection.scalar(select(func.max(schema_version.c.version)))
        if oldest is None:
            connection.execute(insert(schema_version).values(version=OLDEST))
            return
        if oldest > SCHEMA:
            raise ConfigError(
                f"this registry takes servers of schema {oldest} and later, and this loradock knows {SCHEMA}; "
                "start a newer loradock"
            )
        _add_columns(connection)
        if oldest < OLDEST:
            connection.execute(update(schema_version).values(version=OLDEST))
        for table in metadata.sorted_tables:
            for index in table.indexes:
                index.create(connection, checkfirst=True)


def _add_columns(connection: Connection) -> None:
    """Columns that an older release had not, and room for texts that were shorter then."""
    dialect = connection.dialect
    there = {(row[0], row[1]): row[2] for row in connection.execute(text(_COLUMNS[dialect.name]))}
    for table in metadata.sorted_tables:
        for column in table.columns:
            room = there.get((table.name, column.name), 0)
            if (table.name, column.name) not in there:
                spelled = CreateColumn(column).compile(dialect=dialect)
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {spelled}"))
            elif room and room < (getattr(column.type, "length", None) or room):
                kind = column.type.compile(dialect=dialect)
                connection.execute(text(f"ALTER TABLE {table.name} ALTER COLUMN {column.name} TYPE {kind}"))


@contextmanager
def begun(engine: Engine, alone: str | None) -> Iterator[Connection]:
    """A transaction; those that say the same `alone` wait for one another, on all servers. SQLite has one writer
    anyway."""
    with engine.begin() as connection:
        if alone is not None and connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(alone, PREPARING))))
        yield connection


@contextmanager
def translated() -> Iterator[None]:
    """The database's errors, under our names."""
    try:
        yield
    except LoradockError:
        raise
    except (DBAPIError, PoolTimeout) as wrong:
        why = reason(wrong)
        if "full" in why:
            raise OutOfSpace("the registry's disk is full; make room, then try again") from wrong
        raise EngineUnavailable(f"the registry did not take the change ({why}); retry shortly") from wrong


def reason(error: BaseException) -> str:
    """What the database says of it, in a line."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return shown((str(cause).strip().splitlines() or [type(cause).__name__])[0], 200)
