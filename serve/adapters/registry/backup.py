"""A data directory as one file, and back: the registry as it was at one moment, and the bytes that it names.

    backup.tar    backup.json, registry.sqlite, audit.jsonl, audit-*.jsonl, history.jsonl,
                  blobs/DIGEST/..., files/ID, files/answers/PART

A server may run while it is made: the registry is copied in one transaction, and neither blobs nor files of batches
ever change. What is restored is held against its digests, and files against their sizes, before it gets its place. A
batch that was under way goes on where the registry was copied.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from serve.adapters.adapter import FILES
from serve.adapters.store import Store
from serve.errors import ConfigError, LoradockError
from serve.files import fsync, fsync_tree, rename

# Since 2 with files of batches.
FORMAT, FORMATS = 2, (1, 2)
REGISTRY = "registry.sqlite"
AUDIT = "audit.jsonl"
ABOUT = "backup.json"
_BLOB_FILE = "|".join(map(re.escape, FILES))
_LOGS = rf"{AUDIT}|audit-[0-9A-Za-z-]{{1,64}}\.jsonl|history\.jsonl"
_MEMBER = re.compile(
    rf"{ABOUT}|{REGISTRY}|{_LOGS}|blobs/[0-9a-f]{{64}}/({_BLOB_FILE})|files/(answers/)?[A-Za-z0-9-]{{1,64}}"
)
# A version that is deleted while its bytes are read: then the whole is begun again.
ATTEMPTS = 5


def backup(data_dir: Path, out: Path, registry: str = "") -> dict[str, Any]:
    """Write the backup; what is in it. The file appears all at once."""
    source = data_dir / REGISTRY
    if registry and registry != f"sqlite:///{source}":
        raise ConfigError(
            "the registry is not in the data directory: back its database up with its own tools (pg_dump), and then "
            f"{data_dir / 'blobs'}, whose files never change"
        )
    if not source.is_file():
        raise ConfigError(f"{data_dir} is no data directory of loradock: it holds no {REGISTRY}")
    for _ in range(ATTEMPTS):
        try:
            return _write(data_dir, source, out)
        except FileNotFoundError:
            continue
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{out} was not written: {error}") from error
    raise ConfigError(f"adapters are deleted faster than they can be read: try again, or stop the server ({data_dir})")


def restore(file: Path, data_dir: Path) -> dict[str, Any]:
    """Make `data_dir`, which must be empty or absent, from a backup; what was in it."""
    if data_dir.exists() and any(entry.name != "lock" for entry in data_dir.iterdir()):
        raise ConfigError(f"{data_dir} is not empty: restore into a new directory, then serve with --data-dir")
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with _aside(data_dir) as staged:
        about = _extract(file, staged)
        wanted = _digests(staged / REGISTRY)
        store = Store(staged)
        if bad := sorted(digest for digest in wanted if not store.verify(digest)):
            raise ConfigError(
                f"{file} is damaged: the bytes of {bad[0][:12]} are not what its name says ({len(bad)} such)"
            )
        for id, nbytes in _files(staged / REGISTRY):
            there = staged / "files" / id
            if there.is_file() and there.stat().st_size != nbytes:
                raise ConfigError(f"{file} is damaged: {id} has {there.stat().st_size} bytes and not {nbytes}")
        fsync_tree(staged)
        shutil.rmtree(data_dir, ignore_errors=True)
        rename(staged, data_dir)
    return about


def _write(data_dir: Path, source: Path, out: Path) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".backup-") as folder:
        registry = Path(folder) / REGISTRY
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as live,
            closing(sqlite3.connect(registry)) as copy,
        ):
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        digests = _digests(registry)
        # What another server of this registry got is not here, unless both have the same `blobs`.
        files = [id for id, _ in _files(registry) if (data_dir / "files" / id).is_file()]
        parts = [name for name in _parts(registry) if (data_dir / "files/answers" / name).is_file()]
        about = {"format": FORMAT, "made": int(time.time()), "adapters": len(digests), "files": len(files)}
        made = Path(folder) / "backup.tar"
        with tarfile.open(made, "w") as tar:
            _add_bytes(tar, ABOUT, json.dumps(about).encode())
            tar.add(registry, REGISTRY)
            for log in (*data_dir.glob("audit-*.jsonl"), data_dir / AUDIT, data_dir / "history.jsonl"):
                if log.is_file() and _MEMBER.fullmatch(log.name):
                    tar.add(log, log.name)
            for digest in sorted(digests):
                for name in FILES:
                    tar.add(data_dir / "blobs" / digest / name, f"blobs/{digest}/{name}")
            for id in files:
                tar.add(data_dir / "files" / id, f"files/{id}")
            for name in parts:
                tar.add(data_dir / "files/answers" / name, f"files/answers/{name}")
        os.chmod(made, 0o600)
        fsync(made)
        rename(made, out)
    return {**about, "bytes": out.stat().st_size}


def _extract(file: Path, staged: Path) -> dict[str, Any]:
    """Every member, under a name that is one of ours."""
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if not member.isfile() or not _MEMBER.fullmatch(member.name):
                    raise ConfigError(f"{file} is no backup of loradock: it holds {member.name[:100]!r}")
                target = staged / member.name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with source, os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
                    shutil.copyfileobj(source, copy)
        about: dict[str, Any] = json.loads((staged / ABOUT).read_text())
    except (EOFError, tarfile.TarError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{file} is no archive that `loradock backup` wrote, or not all of one ({reason})") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read as a backup: {error}") from error
    if about.get("format") not in FORMATS:
        raise ConfigError(f"{file} has format {about.get('format')} and this loradock knows {FORMAT}: use a newer one")
    return about


def _digests(registry: Path) -> set[str]:
    try:
        with closing(sqlite3.connect(registry)) as database:
            return {row[0] for row in database.execute("SELECT DISTINCT digest FROM versions")}
    except sqlite3.Error as error:
        raise ConfigError(f"{registry.name} is no registry of loradock: {error}") from error


def _files(registry: Path) -> list[tuple[str, int]]:
    """The files of batches, with their sizes; a registry from before there were any has none."""
    try:
        with closing(sqlite3.connect(registry)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'files'").fetchone():
                return []
            return list(database.execute("SELECT id, nbytes FROM files ORDER BY id"))
    except sqlite3.Error as error:
        raise ConfigError(f"{registry.name} is no registry of loradock: {error}") from error


def _parts(registry: Path) -> list[str]:
    """Files of answers of batches that are under way."""
    with closing(sqlite3.connect(registry)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'batch_parts'").fetchone():
            return []
        return [name for (name,) in database.execute("SELECT name FROM batch_parts ORDER BY name")]


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), int(time.time())
    tar.addfile(info, io.BytesIO(data))


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder
    except (OSError, LoradockError):
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
