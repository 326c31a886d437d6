"""A PostgreSQL server for the tests, where Debian's package `postgresql` is installed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from sqlalchemy import create_engine, text

_numbers = itertools.count(1)


def programs() -> Path | None:
    """Where initdb and pg_ctl are; None where they or the driver are not."""
    if importlib.util.find_spec("psycopg") is None:
        return None
    found = [Path(path) for path in sorted(glob("/usr/lib/postgresql/*/bin/initdb"))]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve())
    return found[-1].parent if found else None


class PostgreSQL:
    """A server on a socket of its own in a fresh folder."""

    def __init__(self, bin: Path) -> None:
        self._bin = bin
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has room for 107 bytes
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)

    @property
    def url(self) -> str:
        """SQLAlchemy's, up to the database's name."""
        return f"postgresql+psycopg://loradock@/{{name}}?host={self._folder}"

    @property
    def socket(self) -> str:
        return f"{self._folder}/.s.PGSQL.5432"

    def create(self) -> None:
        self._call("initdb", "-U", "loradock", "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB"
        self._call("pg_ctl", "start", "-w", "-l", str(self._folder / "log"), "-o", options)

    def stop(self) -> None:
        """As a kill: no client is waited for, and the next start repairs what was open."""
        self._call("pg_ctl", "stop", "-m", "immediate")

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(
            command, user=self._user, group=self._user, check=True, cwd=self._folder, stdout=subprocess.DEVNULL,
            timeout=60,
        )  # fmt: skip


@contextmanager
def started(bin: Path) -> Iterator[PostgreSQL]:
    """A fresh server, which may be stopped and started meanwhile."""
    server = PostgreSQL(bin)
    try:
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        server.remove()


@contextmanager
def running(bin: Path) -> Iterator[str]:
    """A fresh server on a socket of its own; gives SQLAlchemy's URL up to the database's name."""
    with started(bin) as server:
        yield server.url


def database(server: str) -> str:
    """A fresh database on that server; its URL."""
    name = f"test_{next(_numbers)}"
    with create_engine(server.format(name="postgres"), isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return server.format(name=name)
