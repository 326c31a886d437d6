"""Registries of earlier and later releases, and what is none: the earlier keep all they had."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import OLDEST, SCHEMA
from serve.auth.keys import Keys
from serve.auth.rate_limits import Limits
from serve.errors import ConfigError
from tests.support.registry import digest, on_sqlite, push

# As loradock with schema 1 made it.
SCHEMA_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE names (
    id INTEGER NOT NULL, name VARCHAR(64) NOT NULL, live INTEGER, trail TEXT NOT NULL, next INTEGER NOT NULL,
    PRIMARY KEY (id), UNIQUE (name)
);
CREATE TABLE versions (
    name_id INTEGER NOT NULL, version INTEGER NOT NULL, digest VARCHAR(64) NOT NULL, rank INTEGER NOT NULL, base TEXT,
    target_modules TEXT NOT NULL, nbytes BIGINT NOT NULL, tensors INTEGER NOT NULL, created FLOAT NOT NULL,
    PRIMARY KEY (name_id, version), UNIQUE (name_id, digest), FOREIGN KEY(name_id) REFERENCES names (id)
);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE history (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, name_id INTEGER NOT NULL, who TEXT NOT NULL,
    what VARCHAR(16) NOT NULL, why TEXT NOT NULL, "when" FLOAT NOT NULL, from_version INTEGER, to_version INTEGER,
    digest VARCHAR(64), FOREIGN KEY(name_id) REFERENCES names (id)
);
CREATE INDEX ix_history_name_id ON history (name_id);
INSERT INTO schema_version VALUES (1);
INSERT INTO names VALUES (7, 'pirate', 2, '[1]', 3);
INSERT INTO versions VALUES (7, 1, '{one}', 8, 'toy', '["k_proj"]', 1234, 4, 1700000000.0);
INSERT INTO versions VALUES (7, 2, '{two}', 8, 'toy', '["k_proj"]', 1234, 4, 1700000001.0);
INSERT INTO history VALUES (1, 7, 'ana', 'add', '', 1700000000.0, NULL, 1, '{one}');
INSERT INTO history VALUES (2, 7, 'ana', 'promote', '', 1700000001.0, NULL, 2, NULL);
"""


@on_sqlite
def test_a_registry_from_before_tenants_keeps_all_it_had(url):
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.executescript(SCHEMA_1.format(one=digest(1), two=digest(2)))
    for _ in ("migrated", "opened again"):
        with Registry(url) as registry:
            assert registry.live("pirate") == registry.get("pirate", 2) and registry.live("pirate").tenant == "default"
            assert not registry.shared("pirate") and registry.generation == 2
            assert [row["what"] for row in registry.history("pirate")] == ["add", "promote"]
    with Registry(url) as registry:
        assert registry.rollback("pirate", by="bo").version == 1
        assert push(registry, "acme/pirate", 1, shared=True) == 1
        assert Keys(registry).create("acme", "ci", ["inference"], Limits())[0] in Keys(registry).all()
    with Registry(url) as registry:
        assert registry.shared("acme/pirate") and not registry.shared("pirate")
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        assert database.execute("SELECT version FROM schema_version").fetchall() == [(OLDEST,)]


# What schema 2, with tenants and before shares of traffic, had more.
SCHEMA_2 = """
ALTER TABLE names ADD COLUMN shared BOOLEAN NOT NULL DEFAULT FALSE;
CREATE TABLE keys (
    id VARCHAR(32) NOT NULL, tenant VARCHAR(64) NOT NULL, name VARCHAR(64) NOT NULL, digest VARCHAR(64) NOT NULL,
    scopes TEXT NOT NULL, limits TEXT NOT NULL, created FLOAT NOT NULL, revoked FLOAT, PRIMARY KEY (id), UNIQUE (digest)
);
UPDATE schema_version SET version = 2;
INSERT INTO names VALUES (8, 'acme/pirate', 1, '[]', 2, TRUE);
INSERT INTO versions VALUES (8, 1, '{two}', 8, 'toy', '["k_proj"]', 1234, 4, 1700000002.0);
INSERT INTO history VALUES (3, 8, 'bo', 'add', '', 1700000002.0, NULL, 1, '{two}');
INSERT INTO keys VALUES ('k1', 'acme', 'ci', 'd1', '["inference"]', '{{}}', 1700000000.0, NULL);
"""


@pytest.mark.parametrize("scripts", [[SCHEMA_1], [SCHEMA_1, SCHEMA_2]], ids=["from 1", "from 2"])
@on_sqlite
def test_a_registry_from_before_shares_keeps_all_it_had_and_takes_them(url, scripts):
    path = url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as database:
        for script in scripts:
            database.executescript(script.format(one=digest(1), two=digest(2)))
    with Registry(url) as registry:
        assert registry.live("pirate").tag == "pirate@v2" and registry.live("pirate").checks == {}
        assert registry.shared("acme/pirate") == (len(scripts) == 2) and not registry.shared("pirate")
        assert [key.id for key in Keys(registry).all()] == ["k1"][: len(scripts) - 1]
        assert registry.canary("pirate") is registry.shadow("pirate") is registry.pinned("pirate") is None
        registry.share("pirate", "canary", 1, 0.5, by="ana")
        registry.pin("pirate", by="ana")
    with Registry(url) as again:
        assert (again.canary("pirate").weight, again.pinned("pirate").version) == (0.5, 2)
        assert [row["weight"] for row in again.history("pirate")] == [None, None, 0.5, None]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT version FROM schema_version").fetchall() == [(OLDEST,)]


@on_sqlite
def test_a_registry_that_was_brought_up_has_the_columns_of_a_new_one(url, tmp_path):
    old, new = url.removeprefix("sqlite:///"), str(tmp_path / "new.db")
    with closing(sqlite3.connect(old)) as database:
        database.executescript(SCHEMA_1.format(one=digest(1), two=digest(2)))
    columns = []
    for path in (old, new):
        Registry(f"sqlite:///{path}").close()
        with closing(sqlite3.connect(path)) as database:
            tables = ("names", "versions", "history", "keys")
            columns.append([{row[1] for row in database.execute(f"PRAGMA table_info({name})")} for name in tables])
    assert columns[0] == columns[1]


@on_sqlite
def test_a_newer_schema_is_left_alone(url):
    Registry(url).close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE schema_version SET version = ?", (SCHEMA + 1,))
    with pytest.raises(ConfigError, match="newer loradock"):
        Registry(url)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////no/such/folder/x.db", "oracle+none://x", "mongodb://x"])
def test_a_registry_that_cannot_be_opened_says_so(bad):
    with pytest.raises(ConfigError, match="cannot be opened"):
        Registry(bad)


def test_a_file_that_is_no_database_says_so(tmp_path):
    (tmp_path / "x.db").write_text("hello" * 1000)
    with pytest.raises(ConfigError, match="loradock registry"):
        Registry(f"sqlite:///{tmp_path}/x.db")


def test_servers_that_start_at_once_over_a_new_registry_all_open_it(tmp_path):
    servers = 6
    start = threading.Barrier(servers)

    def opens(file):
        start.wait(30)
        with Registry(f"sqlite:///{file}") as registry:
            return registry.generation

    with ThreadPoolExecutor(servers) as pool:
        for attempt in range(60):
            assert list(pool.map(opens, [tmp_path / f"{attempt}.db"] * servers)) == [0] * servers
