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


@contextmanager
def running(bin: Path) -> Iterator[str]:
    """A fresh server on a socket of its own; gives SQLAlchemy's URL up to the database's name."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has room for 107 bytes
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB"

    def call(program: str, *arguments: str) -> None:
        command = [str(bin / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=user, group=user, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)

    try:
        call("initdb", "-U", "loradock", "-A", "trust", "-E", "UTF8", "--no-sync")
        call("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield f"postgresql+psycopg://loradock@/{{name}}?host={folder}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def database(server: str) -> str:
    """A fresh database on that server; its URL."""
    name = f"test_{next(_numbers)}"
    with create_engine(server.format(name="postgres"), isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return server.format(name=name)
