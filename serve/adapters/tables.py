"""The registry's tables, the way from an older schema to this one, and the database that holds them.

SQLite in WAL mode or, by its URL, PostgreSQL. What the tables mean: see serve.adapters.registry.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    false,
    func,
    insert,
    select,
    text,
    update,
)  # fmt: skip
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateColumn

from serve.errors import ConfigError, EngineUnavailable, LoradockError, OutOfSpace
from serve.names import shown

SCHEMA = 6
# A database that does not answer is an error after seconds, not after the kernel's quarter of an hour.
LIBPQ_PATIENCE = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# Whoever prepares a PostgreSQL database holds this lock: any number that is the same in every loradock.
PREPARING = 0x10AD0C4

metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

names = Table(
    "names",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name", String(129), nullable=False, unique=True),  # NAME or TENANT/NAME
    Column("live", Integer),
    Column("trail", Text, nullable=False),  # JSON: versions that were live before, the latest last
    Column("next", Integer, nullable=False),  # a number is never given twice, also after a deletion
    Column("shared", Boolean, nullable=False, server_default=false()),  # other tenants may ask it too
    Column("canary_version", Integer),
    Column("canary_weight", Float(53)),
    Column("shadow_version", Integer),
    Column("shadow_weight", Float(53)),
    Column("pinned", Integer),  # 0: whichever version is live
    Column("base", String(256)),  # the name of the base model that it runs on; null: the server's first
    Column("aliases", Text),  # JSON: a fixed name -> the version that it points at
    Column("moved_to", String(129)),  # of a name that was given up: the one that its adapter has now
)

versions = Table(
    "versions",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("rank", Integer, nullable=False),
    Column("base", Text),
    Column("target_modules", Text, nullable=False),  # JSON
    Column("nbytes", BigInteger, nullable=False),
    Column("tensors", Integer, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("checks", Text),  # JSON: what was measured when it was pushed
    Column("tags", Text),  # JSON: a list of texts
    UniqueConstraint("name_id", "digest"),
)

history = Table(
    "history",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name_id", _Id, ForeignKey("names.id"), nullable=False, index=True),
    Column("who", Text, nullable=False),
    Column("what", String(16), nullable=False),
    Column("why", Text, nullable=False),
    Column("when", Float(53), nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("digest", String(64)),
    Column("weight", Float(53)),
    Column("label", Text),  # the alias that moved, or the tags that were set
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # sha256 of the secret, which is nowhere
    Column("scopes", Text, nullable=False),  # JSON
    Column("limits", Text, nullable=False),  # JSON
    Column("created", Float(53), nullable=False),
    Column("revoked", Float(53)),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("node", Text, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("generation", BigInteger, nullable=False),  # of the snapshot that it answers from
    Column("seen", Float(53), nullable=False),
)

bases = Table(
    "bases",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("configured", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

golden_sets = Table(
    "golden_sets",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("digest", String(32), nullable=False),  # of the cases
    Column("document", Text, nullable=False),  # JSON: the set as it was put
    Column("who", Text, nullable=False),
    Column("when", Float(53), nullable=False),
    Column("stamp", BigInteger, nullable=False),  # counts changes of its outcomes
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
    Column("verdict", String(64)),  # the last one that was announced: LIVE:CANARY
)

golden_outcomes = Table(
    "golden_outcomes",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("digest", String(64), primary_key=True),  # of the version's bytes
    Column("case", String(32), primary_key=True),
    Column("basis", Text, nullable=False),  # the base model, and who judged
    Column("result", String(8), nullable=False),
    Column("score", Float(53)),
    Column("first_score", Float(53)),
    Column("runs", Integer, nullable=False),
    Column("changed", Integer, nullable=False),  # runs whose answer was another than the one before
    Column("answer", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

golden_runs = Table(
    "golden_runs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name_id", _Id, ForeignKey("names.id"), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("set", String(32), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("began", Float(53), nullable=False),
    Column("ended", Float(53), nullable=False),
    Column("asked", Integer, nullable=False),
    Column("cases", Integer, nullable=False),  # with a score
    Column("score", Float(53)),
    Column("low", Float(53)),
    Column("high", Float(53)),
)

golden_promotions = Table(
    "golden_promotions",  # versions that become live once their score is good enough
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),  # YYYY-MM-DD, by UTC
    Column("tenant", String(64), primary_key=True),  # who asked
    Column("adapter", String(256), primary_key=True),  # NAME or TENANT/NAME, or a base's name
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("engine_seconds", Float(53), nullable=False),
    Column("cost", Float(53), nullable=False),
)

files = Table(
    "files",  # what clients sent to be answered in batches, and what was answered; the bytes are no part of it
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("who", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("key", String(32), nullable=False),  # the id of the key that made it; "" on a server without keys
    Column("who", Text, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", Text, nullable=False),  # JSON
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
    Column("file_seconds", Float(53), nullable=False),  # for which its output is kept
    Column("times", Text, nullable=False),  # JSON: when it came to which status
    Column("errors", Text, nullable=False),  # JSON: what is wrong with the input
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("output_file", String(64)),
    Column("error_file", String(64)),
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
)

batch_answers = Table(
    "batch_answers",  # of batches that are not at their end: then they are a file
    metadata,
    Column("batch", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("completed", Boolean, nullable=False),  # or failed
    Column("answer", Text, nullable=False),  # a line of the output
)

finetune_jobs = Table(
    "finetune_jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("status", String(20), nullable=False, index=True),
    Column("created", Float(53), nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("asked", Text, nullable=False),  # JSON: what it is to do, which never changes
    Column("state", Text, nullable=False),  # JSON: how far it is
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
)

# The statuses of jobs that are at their end.
FINETUNE_ENDS = ("succeeded", "failed", "cancelled")

finetune_notes = Table(
    "finetune_notes",  # events and checkpoints of jobs
    metadata,
    Column("job", String(64), ForeignKey("finetune_jobs.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # of a checkpoint its step
    Column("when", Float(53), nullable=False),
    Column("content", Text, nullable=False),  # JSON
)


LATEST = select(func.max(history.c.id))  # the generation


def _to_tenants(connection: Connection) -> None:
    """Names get room for a tenant, and are private; the table `keys` is there already, made as every missing one."""
    connection.execute(text("ALTER TABLE names ADD COLUMN shared BOOLEAN NOT NULL DEFAULT FALSE"))
    if connection.dialect.name != "sqlite":  # which does not mind a text's length
        connection.execute(text("ALTER TABLE names ALTER COLUMN name TYPE VARCHAR(129)"))


def _to_traffic(connection: Connection) -> None:
    """Names get shares and pins, versions what was measured."""
    _add_columns(connection, names, "canary_version", "canary_weight", "shadow_version", "shadow_weight", "pinned")
    _add_columns(connection, versions, "checks")
    _add_columns(connection, history, "weight")


def _to_bases(connection: Connection) -> None:
    """Names belong to a base model."""
    _add_columns(connection, names, "base")


def _to_aliases(connection: Connection) -> None:
    """Names get aliases, versions tags."""
    _add_columns(connection, names, "aliases")
    _add_columns(connection, versions, "tags")
    _add_columns(connection, history, "label")


def _to_renames(connection: Connection) -> None:
    """A name that was given up leads to the new one."""
    _add_columns(connection, names, "moved_to")


def _add_columns(connection: Connection, table: Table, *columns: str) -> None:
    for column in columns:
        spelled = CreateColumn(table.c[column]).compile(dialect=connection.dialect)
        connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {spelled}"))


# MIGRATIONS[n](connection) brings a database from schema n to n + 1, in the transaction that counts it up.
MIGRATIONS: dict[int, Callable[[Connection], None]] = {
    1: _to_tenants,
    2: _to_traffic,
    3: _to_bases,
    4: _to_aliases,
    5: _to_renames,
}


def opened(url: str) -> Engine:
    """The database behind SQLAlchemy's URL; ConfigError when there can be none."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            patience = LIBPQ_PATIENCE if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
            defaults = {key: value for key, value in patience.items() if key not in parsed.query}
            return create_engine(parsed, pool_pre_ping=True, connect_args=defaults)
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
        for pragma in ("busy_timeout=15000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Take the write lock before reading what the write depends on; a later upgrade could fail.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def prepare(engine: Engine) -> None:
    """Tables that are missing are made, an older schema is brought up; ConfigError for a newer one."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Two servers that start at once over an empty database would both make the tables.
            connection.execute(select(func.pg_advisory_xact_lock(PREPARING)))
        metadata.create_all(connection)
        schema = connection.scalar(select(func.max(schema_version.c.version)))
        if schema is None:
            connection.execute(insert(schema_version).values(version=SCHEMA))
            return
        if schema > SCHEMA:
            raise ConfigError(
                f"this registry has schema {schema} and this loradock knows {SCHEMA}; "
                "start the newer loradock that wrote it"
            )
        for step in range(schema, SCHEMA):
            MIGRATIONS[step](connection)
            connection.execute(update(schema_version).values(version=step + 1))


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
