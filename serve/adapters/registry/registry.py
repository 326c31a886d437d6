"""Names, versions, live pointers and their history: the only mutable truth.

    names      one row a name: which version is live, which were live before it, the next version number; which one
               takes a share of its traffic (canary), answers unseen (shadow), or stays in the engine (pinned); aliases
    versions   one row a version: its digest, what `inspect` found, what the probe measured, its tags
    history    one row a change: who, what, why, when, from which version to which; only ever appended
    keys       one row an API key, as its digest; written by serve.auth.keys
    bases      one row a base model that was swapped: what serves in the place of what is configured
    replicas   one row a server that shares this registry: how far it has read; written by serve.fleet.heartbeat
    golden_*   golden sets and what versions answered to them; written by serve.rollout.golden.golden_store
    usage      one row a day, tenant and adapter: what was used; written by serve.telemetry.usage.usage_ledger

Every change is one transaction that writes its history row. Readers never meet the database: they read a snapshot, an
immutable dictionary that each change replaces. `Registry(url)` is SQLite in WAL mode or, by its URL, PostgreSQL.

A name here is a full name, which holds its tenant (see serve.names). It is private to that tenant unless it is shared.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from serve.adapters.adapter import Adapter, Inspection
from serve.adapters.registry import database, tables
from serve.adapters.registry.change import Change, check_expected, without_repeats
from serve.adapters.registry.snapshot import Share, Snapshot, SnapshotReader, follow_snapshot, missing, read_snapshot
from serve.adapters.registry.standing_rollbacks import StandingRollback, StandingRollbacks
from serve.adapters.registry.tables import bases, history, keys, names, versions
from serve.errors import BadRequest, ConfigError, Conflict, EngineUnavailable, NotFound
from serve.files import append_whole
from serve.names import check_alias, check_full_name, check_tags, shown

log = logging.getLogger(__name__)

# Changes that leave the history in one transaction.
HISTORY_AT_ONCE = 500
MAX_ALIASES = 32  # of one name
# Changes of which version is live.
MOVES = ("promote", "rollback", "fallback", "unload")
_STAMP = select(
    tables.LATEST.scalar_subquery(),
    select(func.count(keys.c.id)).scalar_subquery(),
    # Counted: the clock of the server that revoked a key may be behind the others'.
    select(func.count(keys.c.revoked)).scalar_subquery(),
    select(func.count(bases.c.name)).scalar_subquery(),
    select(func.max(bases.c.when)).scalar_subquery(),
    select(func.max(tables.server_messages.c.id)).scalar_subquery(),
)
# How a read spares the database a lock or a transaction, by whether that is SQLite.
_READING: dict[bool, dict[str, Any]] = {True: {"reads": True}, False: {"isolation_level": "AUTOCOMMIT"}}


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a change leaves another one of, by what it changed."""

    names: int | None = None
    keys: tuple[Any, ...] = ()
    bases: tuple[Any, ...] = ()
    messages: int | None = None


class Registry(SnapshotReader):
    """Sync and thread-safe. `url` is SQLAlchemy's: sqlite:///path/to/registry.db, postgresql+psycopg://..."""

    def __init__(self, url: str, *, standing: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.standing = StandingRollbacks(standing)
        self._writing = threading.RLock()
        self._publishing = threading.Lock()
        self._engine = database.opened(url)
        is_sqlite = self._engine.dialect.name == "sqlite"
        self._reading = self._engine.execution_options(**_READING[is_sqlite])
        # Not over `_reading`: what that has set would win.
        moment = {"isolation_level": "REPEATABLE READ"}
        self._together = self._reading if is_sqlite else self._engine.execution_options(**moment)
        # A database in memory has one connection for all threads.
        self._shared_memory = self._writing if isinstance(self._engine.pool, StaticPool) else nullcontext()
        try:
            database.prepare(self._engine)
            self._stored = self._read(read_snapshot)
            self._snapshot = self.standing.over(self._stored)
        except SQLAlchemyError as unusable:
            self._engine.dispose()
            raise ConfigError(
                f"the registry cannot be opened ({database.reason(unusable)}); is its place writable, "
                "and is it a loradock registry?"
            ) from unusable
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Let go of the database; the snapshot stays readable."""
        with self._writing:
            self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Changes

    def add(
        self,
        name: str,
        inspection: Inspection,
        digest: str,
        *,
        by: str,
        promote: bool = True,
        why: str = "",
        expected: int | None = None,
        shared: bool | None = None,
        checks: Mapping[str, Any] | None = None,
        base: str | None = None,
        check: Callable[[Sequence[Any]], None] = lambda kept: None,
    ) -> tuple[Adapter, bool]:
        """A new version of `name`, or the one that already has these bytes; True if it is new.

        `shared` opens the name to other tenants, or closes it; None leaves it as it is, and a new name private. All
        versions of a name run on one `base`, as long as it has any. `check` may refuse a new one for those that its
        tenant has: nobody adds another before this one is there.
        """
        check_full_name(name)
        with self._change(name, create=True, expected=expected) as change:
            if not change.versions():
                change.base = base
            elif change.base != base:
                raise Conflict(f"the versions of {shown(name)} run on {change.base or 'the first base'}: not on {base}")
            version = change.connection.scalar(
                select(versions.c.version).where(versions.c.name_id == change.id, versions.c.digest == digest)
            )
            created = version is None
            if version is None:
                check(change.kept())
                version = change.next
                row = {
                    "name_id": change.id, "version": version, "digest": digest, "rank": inspection.rank,
                    "base": inspection.base, "target_modules": json.dumps(inspection.target_modules),
                    "nbytes": inspection.nbytes, "tensors": inspection.tensors, "created": self._clock(),
                    "checks": json.dumps(checks or {}),
                }  # fmt: skip
                change.connection.execute(insert(versions).values(row))
                change.next += 1
                change.log("add", by, why, None, version, digest)
            if promote:
                change.point(version, "promote", by, why)
            if shared is not None and shared != change.shared:
                change.shared = shared
                change.log("share" if shared else "unshare", by, why, None, None)
            adapter = change.versions()[version]
        return adapter, created

    def promote(self, name: str, version: int, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """Make `version` the live one."""
        with self._change(name, expected=expected) as change:
            adapter = change.version(version)
            change.point(version, "promote", by, why)
        return adapter

    def unload(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """Take the name from its live version, which is the answer; NotFound, if none is live. All versions stay."""
        with self._change(name, expected=expected) as change:
            return change.version(change.unload(by, why))

    def rollback(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """Back to the version that was live before; again, to the one before that."""
        with self._change(name, expected=expected) as change:
            if not change.trail:
                raise Conflict(f"no earlier version of {shown(name)} was live; promote the version you want")
            was, change.live = change.live, change.trail.pop()
            change.log("rollback", by, why, was, change.live)
            change.end_shares(by)
            target = change.version(change.live)
        return target

    def roll_back_here(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """As `rollback`, on this server alone and without the database, until `write_down`. It waits for nothing."""
        entry = self._snapshot.entries.get(name)
        if entry is None:
            raise missing(name)
        check_expected(name, entry.live.version if entry.live else None, expected)
        if self.standing.holds(name, canary=False):
            raise EngineUnavailable(
                f"the registry is out of reach, and a rollback of {shown(name)} waits for it already"
            )
        if entry.live is None or not entry.trail:
            raise Conflict(f"no earlier version of {shown(name)} was live; promote the version you want")
        self._hold(StandingRollback(name, entry.live.version, entry.trail[-1], by, why, self.generation))
        return entry.versions[entry.trail[-1]]

    def end_canary_here(self, name: str, version: int, *, by: str, why: str = "") -> None:
        """As a canary's share of 0, on this server alone and without the database, until `write_down`."""
        if not self.standing.holds(name, canary=True):
            self._hold(StandingRollback(name, version, None, by, why, self.generation))

    def _hold(self, rollback: StandingRollback) -> None:
        with self._publishing:
            self.standing.note(rollback)
            self._snapshot = self.standing.over(self._snapshot)

    def write_down(self) -> None:
        """Bring rollbacks that hold here alone into the database; where another change came first, that one holds."""
        self.refresh()  # another server may have renamed them
        for rollback in self.standing.all():
            try:
                if self._is_overtaken(rollback):
                    raise Conflict("its live version, or its canary, was changed since")
                if rollback.target is None:
                    self.share(rollback.name, "canary", rollback.version, 0, by=rollback.by, why=rollback.why)
                else:
                    self.rollback(rollback.name, by=rollback.by, why=rollback.why, expected=rollback.version)
            except (Conflict, NotFound) as moved:
                log.info("a rollback of %s is not written down: %s", rollback.name, moved.message)
            self.standing.drop(rollback)
            self.standing.keep()

    def _is_overtaken(self, rollback: StandingRollback) -> bool:
        """Another server changed what answers since, if also to the same version again."""
        if rollback.generation is None:
            return False
        moves = MOVES if rollback.target is not None else ("canary",)
        later = select(history.c.id).join(names, names.c.id == history.c.name_id)
        later = later.where(
            names.c.name == rollback.name, history.c.id > rollback.generation, history.c.what.in_(moves)
        )
        with self.reading() as connection:
            return connection.scalar(later.limit(1)) is not None

    def delete(
        self,
        name: str,
        version: int | None = None,
        *,
        by: str,
        why: str = "",
        force: bool = False,
        expected: int | None = None,
    ) -> list[Adapter]:
        """Remove a version, or the name with all of them, and answer what is gone.

        The live version, while others exist, and one that an alias names go by force only. After the live one, the one
        that was live before answers again.
        """
        with self._change(name, expected=expected) as change:
            there = change.versions()
            if version is not None and version not in there:
                raise missing(f"{name}@v{version}")
            doomed = sorted(there) if version is None else [version]
            if version is not None and not force:
                change.check_unused(version, len(there))
            gone = [there[number] for number in doomed]
            where = (versions.c.name_id == change.id) & versions.c.version.in_(doomed)
            change.connection.execute(delete(versions).where(where))
            change.trail = without_repeats([number for number in change.trail if number not in doomed])
            if len(doomed) == len(there):
                change.shared = False  # or the next adapter of this name would be born shared
                change.end_moves()
            for number in doomed:
                change.log("delete", by, why, number, None, there[number].digest)
            if change.live in doomed:
                change.end_shares(by)
                was, change.live = change.live, change.trail.pop() if change.trail else None
                if change.live is not None:
                    change.log("fallback", by, why, was, change.live)
            elif change.trail and change.trail[-1] == change.live:
                change.trail.pop()  # 3, 2 before 3, without 2: to roll back to 3 would go nowhere
            change.end_shares(by, only=doomed)
            change.end_aliases(by, only=doomed)
            if change.pinned in doomed or len(doomed) == len(there):
                change.pinned = None
        return gone

    def share(
        self, name: str, kind: str, version: int, weight: float, *, by: str, why: str = "", expected: int | None = None
    ) -> Share | None:
        """Give a version a share of the name's traffic, as its `canary` or `shadow`; weight 0 ends it.

        It ends by itself when another version becomes live, or when its own is deleted.
        """
        if not 0 <= weight <= 1:
            raise BadRequest(f"weight takes a number from 0 to 1, not {weight}", param="weight")
        with self._change(name, expected=expected) as change:
            adapter = change.version(version)
            before = change.shares.get(kind)
            if weight == 0:
                if before and before[0] == version:
                    change.end_share(kind, by, why)
                return None
            if change.live is None:
                raise Conflict(f"no version of {shown(name)} is live: promote one first, then share its traffic")
            if version == change.live:
                raise Conflict(f"{shown(name)}@v{version} is live already; give the share to another version")
            if before != (version, weight):
                change.shares[kind] = (version, weight)
                change.log(kind, by, why, change.live, version, adapter.digest, weight)
        return Share(adapter, weight)

    def publish(self, name: str, shared: bool, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Open the name to other tenants, or close it."""
        with self._change(name, expected=expected) as change:
            if shared != change.shared:
                change.shared = shared
                change.log("share" if shared else "unshare", by, why, None, None)

    def pin(
        self, name: str, version: int | None = None, *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Keep a version in the engine; without one, whichever is live."""
        with self._change(name, expected=expected) as change:
            if version is not None:
                change.version(version)
            if change.pinned != (version or 0):
                change.log("pin", by, why, change.pinned or None, version)
                change.pinned = version or 0

    def unpin(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let the name's versions come and go again."""
        with self._change(name, expected=expected) as change:
            if change.pinned is not None:
                change.log("unpin", by, why, change.pinned or None, None)
                change.pinned = None

    def alias(
        self, name: str, alias: str, version: int, *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Point NAME@ALIAS at a version, whichever it pointed at before."""
        check_alias(alias)
        with self._change(name, expected=expected) as change:
            adapter, before = change.version(version), change.aliases.get(alias)
            if before is None and len(change.aliases) >= MAX_ALIASES:
                raise Conflict(f"{shown(name)} has {MAX_ALIASES} aliases, as many as it may: remove one first")
            if before != version:
                change.aliases[alias] = version
                change.log("alias", by, why, before, version, adapter.digest, label=alias)

    def unalias(self, name: str, alias: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """NAME@ALIAS means nothing any more."""
        with self._change(name, expected=expected) as change:
            if alias not in change.aliases:
                raise NotFound(f"{shown(name)} has no alias `{shown(alias)}`", param="alias")
            change.end_alias(alias, by, why)

    def tag(
        self, name: str, version: int, tags: Iterable[str], *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Write tags on a version, in the place of those that it has."""
        texts = check_tags(tags)
        with self._change(name, expected=expected) as change:
            if change.version(version).tags != texts:
                row = (versions.c.name_id == change.id) & (versions.c.version == version)
                change.connection.execute(update(versions).where(row).values(tags=json.dumps(texts)))
                change.log("tag", by, why, None, version, label=json.dumps(texts, ensure_ascii=False))

    def rename(self, name: str, new: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Give the adapter another name, with its versions and its history; the old one leads to it from then on."""
        check_full_name(new)
        if name in self.standing:
            raise EngineUnavailable(f"a rollback of {shown(name)} waits for the registry: rename it after that")
        with self._change(name, expected=expected) as change:
            change.rename(new, by, why)

    def end_move(self, name: str, *, by: str) -> None:
        """A name that was given up leads nowhere any more."""
        if (target := self.moved_to(name)) is None:
            raise missing(name)
        with self._change(target) as change:
            change.end_move(name, by)

    def note(
        self,
        name: str,
        what: str,
        version: int,
        *,
        by: str,
        why: str = "",
        checks: Mapping[str, Any] | None = None,
    ) -> None:
        """Write something that happened to a version into the history; `checks` are kept beside those that it has."""
        with self._change(name) as change:
            if checks:
                row = (versions.c.name_id == change.id) & (versions.c.version == version)
                both = json.dumps({**change.version(version).checks, **checks})
                change.connection.execute(update(versions).where(row).values(checks=both))
            change.log(what, by, why, version, None)

    # Reads, from the database; they wait for no change that is under way

    def expect(self, name: str, expected: int) -> None:
        """Conflict, if another version is live (0: none). Spares work in vain: the change itself looks again."""
        self.refresh()
        live = self.live(name)
        check_expected(name, live.version if live else None, expected)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every change of a name, oldest first, also after its last version is gone."""
        columns = [column for column in history.c if column.name not in ("id", "name_id")]
        query = select(*columns).join(names).where(names.c.name == name).order_by(history.c.id)
        with database.translated(), self._shared_memory, self._reading.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        if not rows:
            raise missing(name)
        return rows

    def rotate_history(self, rows: int, archive: Path) -> int:
        """Move all but the latest `rows` changes of each name to the end of a file of JSON lines; how many that were.

        They are in the file for good before they leave the database: after a kill some may be in both.
        """
        latest = func.row_number().over(partition_by=history.c.name_id, order_by=history.c.id.desc()).label("latest")
        numbered = select(history, names.c.name, latest).join(names, names.c.id == history.c.name_id).subquery()
        query = select(numbered).where(numbered.c.latest > rows).order_by(numbered.c.id).limit(HISTORY_AT_ONCE)
        with self.reading() as connection:
            old = [dict(row) for row in connection.execute(query).mappings()]
        if old:
            lines = [json.dumps({key: row[key] for key in row if key not in ("name_id", "latest")}) for row in old]
            append_whole(archive, "".join(line + "\n" for line in lines).encode())
            with self.adding() as connection:
                connection.execute(delete(history).where(history.c.id.in_([row["id"] for row in old])))
        return len(old)

    def refresh(self) -> bool:
        """Read what another process has changed, if it has: True. It waits for no change that is under way."""
        generation = self.generation
        with database.translated():
            while True:
                before = self._stored
                after = self._read(partial(follow_snapshot, before=before))
                if self._publish(before, after):
                    return after.generation != generation

    def stamp(self) -> Stamp:
        """Another one after each change that another process may have made: of names, keys, bases or messages."""
        with self.reading() as connection:
            names, *others, messages = connection.execute(_STAMP).one()
            return Stamp(names, tuple(others[:2]), tuple(others[2:]), messages)

    def swapped(self, base: str, configured: str) -> str | None:
        """The model that was put in the place of the configured one; None also once another one is configured."""
        query = select(bases.c.model).where(bases.c.name == base, bases.c.configured == configured)
        with self.reading() as connection:
            return connection.scalar(query)

    def swap(self, base: str, configured: str, model: str, *, by: str) -> None:
        """From now on `model` serves in the place of the configured one."""
        with self.transaction() as connection:
            connection.execute(delete(bases).where(bases.c.name == base))
            if model != configured:
                row = {"name": base, "configured": configured, "model": model, "who": by, "when": self._clock()}
                connection.execute(insert(bases).values(**row))

    # For neighbours that keep a table of their own here

    @contextmanager
    def reading(self, *, together: bool = False) -> Iterator[Connection]:
        """A connection for one query, or for several that see one moment `together`; its errors are ours, and it waits
        for no change that is under way."""
        opened = self._one_moment if together else self._reading.connect
        with database.translated(), self._shared_memory, opened() as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction on the database, whose errors are ours."""
        with self._writing, database.translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def adding(self, alone: str | None = None) -> Iterator[Connection]:
        """A transaction on a table that no snapshot holds, one after another with those that say the same `alone`, on
        all servers: what a tenant has, say, holds until it is counted."""
        with database.translated(), self._shared_memory, database.begun(self._engine, alone) as connection:
            yield connection

    # Inside

    @contextmanager
    def _change(self, name: str, *, create: bool = False, expected: int | None = None) -> Iterator[Change]:
        """One transaction on one name; the snapshot follows once it is committed.

        `expected` is the version that must be live now (0: none), or Conflict.
        """
        with self._writing:
            with self.transaction() as connection:
                if connection.dialect.name == "postgresql":
                    # One writer at a time, as SQLite has it: else history's ids would not rise in commit order.
                    connection.execute(text("LOCK TABLE history IN EXCLUSIVE MODE"))
                change = Change.of(connection, name, self._clock, create=create)
                before = self._stored
                is_read = (connection.scalar(tables.LATEST) or 0) == before.generation
                check_expected(name, change.live, expected)
                yield change
                change.save()
                entry = change.entry()
                generation = connection.scalar(tables.LATEST) or 0
            # Another process may have changed other names, which this generation holds too; or this change itself has.
            if is_read and not change.others:
                entries = {key: value for key, value in before.entries.items() if key != name}
                if entry is not None:
                    entries[name] = entry
                if self._publish(before, replace(before, generation=generation, entries=entries)):
                    return
            self.refresh()

    def _publish(self, before: Snapshot, after: Snapshot) -> bool:
        """Take it, unless something else was taken in the place of `before` meanwhile: False."""
        with self._publishing:
            if self._stored is not before:
                return False
            self._stored = after
            self._snapshot = self.standing.over(after)
            return True

    def _read(self, read: Callable[[Connection], Snapshot]) -> Snapshot:
        with self._shared_memory, self._one_moment() as connection:
            return read(connection)

    @contextmanager
    def _one_moment(self) -> Iterator[Connection]:
        with self._together.connect() as connection, connection.begin():
            yield connection
