"""What a server of the release before does to the database, by the tables and the statements of then."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import MetaData, create_engine, func, insert, select, text, update

from serve.adapters.registry import database

# As the release of November 27 made it, which refuses a database whose version is above this.
SQL, SCHEMA = Path(__file__).parents[1] / "fixtures" / "registry-schema-6.sql", 6


def make_before(url):
    """What the release before makes of an empty database."""
    engine = database.opened(url)
    id = {"sqlite": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
    with engine.begin() as connection:
        for statement in SQL.read_text().replace("{id}", id[engine.dialect.name]).split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
        connection.execute(text(f"INSERT INTO schema_version VALUES ({SCHEMA})"))
    engine.dispose()


def tables_before():
    """The tables as the release before knows them."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        for statement in SQL.read_text().replace("{id}", "INTEGER NOT NULL PRIMARY KEY").split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
        tables = MetaData()
        tables.reflect(connection)
    return tables


class ServerBefore:
    """A server of the release before, beside others: it beats, counts usage, and promotes two versions in turn.

    `acknowledged` is the version that it made live last, `begun` the one that it is about to.
    """

    def __init__(self, url: str, name: str) -> None:
        self.acknowledged = self.begun = 0
        self.promotions = 0
        self.day = str(datetime.now(UTC).date() - timedelta(days=3))
        self._engine = database.opened(url)
        self._tables = tables_before().tables
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> ServerBefore:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._engine.dispose()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.02):
                self._beat()
                self._use()
                self._promote(1 + self.promotions % 2)
        except BaseException as error:
            self.error = error

    def _beat(self) -> None:
        replicas, version = self._tables["replicas"], self._tables["schema_version"].c.version
        row = {"node": "before", "phase": "ready", "generation": 0, "seen": float(self.promotions)}
        with self._engine.begin() as connection:
            assert connection.scalar(select(func.max(version))) <= SCHEMA, "it could not start again"
            if not connection.execute(update(replicas).where(replicas.c.id == "before").values(row)).rowcount:
                connection.execute(insert(replicas).values(id="before", **row))

    def _use(self) -> None:
        usage = self._tables["usage"]
        key = {"day": self.day, "tenant": "default", "adapter": self._name}
        numbers = [column.name for column in usage.columns if not column.primary_key]
        with self._engine.begin() as connection:
            here = [usage.c[column] == value for column, value in key.items()]
            more = {column: usage.c[column] + 1 for column in numbers}
            if not connection.execute(update(usage).where(*here).values(more)).rowcount:
                connection.execute(insert(usage).values({**key, **dict.fromkeys(numbers, 1)}))

    def _promote(self, version: int) -> None:
        names, history = self._tables["names"], self._tables["history"]
        self.begun = version
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("LOCK TABLE history IN EXCLUSIVE MODE"))
            row = connection.execute(select(names).where(names.c.name == self._name).with_for_update()).one()
            if row.live != version:
                point = {"live": version, "trail": json.dumps([row.live])}
                connection.execute(update(names).where(names.c.id == row.id).values(point))
                entry = {"name_id": row.id, "who": "before", "what": "promote", "why": "", "when": 1.0}
                connection.execute(insert(history).values(**entry, from_version=row.live, to_version=version))
        self.promotions += 1
        self.acknowledged = version
