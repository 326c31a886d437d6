"""Names, versions, live pointers and their history: the only mutable truth.

    names      one row a name: which version is live, which were live before it, the next version number; which one
               takes a share of its traffic (canary), answers unseen (shadow), or stays in the engine (pinned)
    versions   one row a version: its digest, what `inspect` found and what the probe measured
    history    one row a change: who, what, why, when, from which version to which; only ever appended
    keys       one row an API key, as its digest; written by serve.auth.keys
    bases      one row a base model that was swapped: what serves in the place of what is configured
    replicas   one row a server that shares this registry: how far it has read; written by serve.rollout.registry_sync

Every change is one transaction that writes its history row. Readers never meet the database: they read a snapshot, an
immutable dictionary that each change replaces. `Registry(url)` is SQLite in WAL mode or, by its URL, PostgreSQL.

A name here is a full name, which holds its tenant (see serve.names). It is private to that tenant unless it is shared.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from serve.adapters import tables
from serve.adapters.adapter import Adapter, Inspection
from serve.adapters.tables import bases, history, keys, names, versions
from serve.errors import BadRequest, ConfigError, Conflict, NotFound
from serve.names import check_full_name, shown

_PINNED = re.compile(r"(?P<name>[^@]+)@(?:v(?P<version>[1-9][0-9]{0,8})|(?P<digest>[0-9a-f]{12}))")
_TRAIL = 64

_LATEST = select(func.max(history.c.id))
_STAMP = select(
    _LATEST.scalar_subquery(),
    select(func.count(keys.c.id)).scalar_subquery(),
    select(func.max(keys.c.revoked)).scalar_subquery(),
    select(func.count(bases.c.name)).scalar_subquery(),
    select(func.max(bases.c.when)).scalar_subquery(),
)
# How a read spares the database a lock or a transaction, by whether that is SQLite.
_READING: dict[bool, dict[str, Any]] = {True: {"reads": True}, False: {"isolation_level": "AUTOCOMMIT"}}


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a name's traffic, from 0 to 1, for a version that is not live."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class _Entry:
    """One name, as the hot path sees it."""

    live: Adapter | None
    versions: Mapping[int, Adapter]
    digests: Mapping[str, Adapter]  # by their first 12 digits
    shared: bool
    canary: Share | None = None
    shadow: Share | None = None
    pinned: Adapter | None = None
    is_pinned: bool = False
    base: str | None = None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    generation: int
    entries: Mapping[str, _Entry]


class Registry:
    """Sync and thread-safe. `url` is SQLAlchemy's: sqlite:///path/to/registry.db, postgresql+psycopg://..."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._writing = threading.RLock()
        self._engine = tables.opened(url)
        self._reading = self._engine.execution_options(**_READING[self._engine.dialect.name == "sqlite"])
        try:
            tables.prepare(self._engine)
            self._snapshot = self._read()
        except SQLAlchemyError as unusable:
            self._engine.dispose()
            raise ConfigError(
                f"the registry cannot be opened ({tables.reason(unusable)}); is its place writable, "
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
    ) -> tuple[Adapter, bool]:
        """A new version of `name`, or the one that already has these bytes; True if it is new.

        `shared` opens the name to other tenants, or closes it; None leaves it as it is, and a new name private. All
        versions of a name run on one `base`, as long as it has any.
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
                version = change.next
                change.connection.execute(
                    insert(versions).values(
                        name_id=change.id,
                        version=version,
                        digest=digest,
                        rank=inspection.rank,
                        base=inspection.base,
                        target_modules=json.dumps(inspection.target_modules),
                        nbytes=inspection.nbytes,
                        tensors=inspection.tensors,
                        created=self._clock(),
                        checks=json.dumps(checks or {}),
                    )
                )
                change.next += 1
                change.log("add", by, why, None, version, digest)
            if promote:
                self._point(change, version, "promote", by, why)
            if shared is not None and shared != change.shared:
                change.shared = shared
                change.log("share" if shared else "unshare", by, why, None, None)
            adapter = change.versions()[version]
        return adapter, created

    def promote(self, name: str, version: int, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """Make `version` the live one."""
        with self._change(name, expected=expected) as change:
            there = change.versions()
            if version not in there:
                raise _missing(f"{name}@v{version}")
            self._point(change, version, "promote", by, why)
        return there[version]

    def rollback(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """Back to the version that was live before; again, to the one before that."""
        with self._change(name, expected=expected) as change:
            if not change.trail:
                raise Conflict(f"no earlier version of {shown(name)} was live; promote the version you want")
            was, change.live = change.live, change.trail.pop()
            change.log("rollback", by, why, was, change.live)
            change.end_shares(by)
            target = change.versions()[change.live]
        return target

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

        The live version, while others exist, goes by force only; then the one that was live before answers again.
        """
        with self._change(name, expected=expected) as change:
            there = change.versions()
            if version is not None and version not in there:
                raise _missing(f"{name}@v{version}")
            doomed = sorted(there) if version is None else [version]
            if version is not None and version == change.live and len(there) > 1 and not force:
                raise Conflict(
                    f"{shown(name)}@v{version} is live; promote another version first, or delete it with force",
                    code="live",
                )
            gone = [there[number] for number in doomed]
            where = (versions.c.name_id == change.id) & versions.c.version.in_(doomed)
            change.connection.execute(delete(versions).where(where))
            change.trail = _walk([number for number in change.trail if number not in doomed])
            if len(doomed) == len(there):
                change.shared = False  # or the next adapter of this name would be born shared
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
            there = change.versions()
            if version not in there:
                raise _missing(f"{name}@v{version}")
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
                change.log(kind, by, why, change.live, version, there[version].digest, weight)
        return Share(there[version], weight)

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
            if version is not None and version not in change.versions():
                raise _missing(f"{name}@v{version}")
            if change.pinned != (version or 0):
                change.log("pin", by, why, change.pinned or None, version)
                change.pinned = version or 0

    def unpin(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let the name's versions come and go again."""
        with self._change(name, expected=expected) as change:
            if change.pinned is not None:
                change.log("unpin", by, why, change.pinned or None, None)
                change.pinned = None

    def note(self, name: str, what: str, version: int, *, by: str, why: str = "") -> None:
        """Write something that happened to a version into the history; it changes nothing."""
        with self._change(name) as change:
            change.log(what, by, why, version, None)

    # Reads, from the snapshot

    @property
    def generation(self) -> int:
        """Rises with each change, and survives a restart."""
        return self._snapshot.generation

    def live(self, name: str) -> Adapter | None:
        """The version that answers for `name`, if any."""
        entry = self._snapshot.entries.get(name)
        return entry.live if entry else None

    def expect(self, name: str, expected: int) -> None:
        """Conflict, if another version is live (0: none). Spares work in vain: the change itself looks again."""
        self.refresh()
        live = self.live(name)
        _expect(name, live.version if live else None, expected)

    def __contains__(self, name: str) -> bool:
        """The name has a version."""
        return name in self._snapshot.entries

    def shared(self, name: str) -> bool:
        """Other tenants may ask it too."""
        entry = self._snapshot.entries.get(name)
        return entry is not None and entry.shared

    def base(self, name: str) -> str | None:
        """The base model that the versions of `name` run on; None is the server's first."""
        entry = self._snapshot.entries.get(name)
        return entry.base if entry else None

    def canary(self, name: str) -> Share | None:
        """The version that takes a share of the requests for `name`, if any."""
        entry = self._snapshot.entries.get(name)
        return entry.canary if entry else None

    def shadow(self, name: str) -> Share | None:
        """The version that also answers a share of the requests for `name`, unseen, if any."""
        entry = self._snapshot.entries.get(name)
        return entry.shadow if entry else None

    def pinned(self, name: str) -> Adapter | None:
        """The version of `name` that stays in the engine, if any."""
        entry = self._snapshot.entries.get(name)
        return entry.pinned if entry else None

    def pinned_names(self) -> list[str]:
        """The names that are pinned, also while none of their versions is live."""
        return sorted(name for name, entry in self._snapshot.entries.items() if entry.is_pinned)

    def get(self, name: str, version: int) -> Adapter:
        """That very version."""
        entry = self._snapshot.entries.get(name)
        if entry is None or version not in entry.versions:
            raise _missing(f"{name}@v{version}")
        return entry.versions[version]

    def resolve(self, public: str) -> Adapter:
        """NAME (its live version), NAME@vN or NAME@DIGEST12."""
        entries = self._snapshot.entries
        adapter: Adapter | None = None
        if pinned := _PINNED.fullmatch(public):
            entry = entries.get(pinned["name"])
            if entry and pinned["version"]:
                adapter = entry.versions.get(int(pinned["version"]))
            elif entry:
                adapter = entry.digests.get(pinned["digest"])
        elif entry := entries.get(public):
            adapter = entry.live
        if adapter is None:
            raise _missing(public)
        return adapter

    def names(self) -> list[str]:
        """Every name that has a version."""
        return sorted(self._snapshot.entries)

    def versions(self, name: str) -> list[Adapter]:
        """The versions of a name, oldest first."""
        entry = self._snapshot.entries.get(name)
        if entry is None:
            raise _missing(name)
        return [entry.versions[number] for number in sorted(entry.versions)]

    def adapters(self) -> list[Adapter]:
        """Every version of every name."""
        entries = self._snapshot.entries
        return [entries[name].versions[number] for name in sorted(entries) for number in sorted(entries[name].versions)]

    def digests(self) -> set[str]:
        """Whose bytes must stay."""
        return {adapter.digest for adapter in self.adapters()}

    # Reads, from the database

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every change of a name, oldest first, also after its last version is gone."""
        columns = [column for column in history.c if column.name not in ("id", "name_id")]
        query = select(*columns).join(names).where(names.c.name == name).order_by(history.c.id)
        with tables.translated(), self._writing, self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        if not rows:
            raise _missing(name)
        return rows

    def before(self, name: str) -> int | None:
        """The version that a rollback would make live."""
        query = select(names.c.trail).where(names.c.name == name)
        with tables.translated(), self._writing, self._engine.connect() as connection:
            trail = json.loads(connection.scalar(query) or "[]")
        return trail[-1] if trail else None

    def refresh(self) -> bool:
        """Read again what another process may have changed; True if it had."""
        with self._writing, tables.translated():
            before, self._snapshot = self._snapshot.generation, self._read()
            return self._snapshot.generation != before

    def stamp(self) -> tuple[Any, ...]:
        """Another one after each change that another process may have made: of names, keys or bases.

        One query, which waits for no change that is under way.
        """
        with tables.translated(), self._reading.connect() as connection:
            return tuple(connection.execute(_STAMP).one())

    def swapped(self, base: str, configured: str) -> str | None:
        """The model that was put in the place of the configured one; None also once another one is configured."""
        with self.transaction() as connection:
            query = select(bases.c.model).where(bases.c.name == base, bases.c.configured == configured)
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
    def transaction(self) -> Iterator[Connection]:
        """One transaction on the database, whose errors are ours."""
        with self._writing, tables.translated(), self._engine.begin() as connection:
            yield connection

    # Inside

    def _point(self, change: _Change, version: int, what: str, by: str, why: str) -> None:
        if change.live == version:
            return
        was, change.live = change.live, version
        if was is not None:
            change.trail = _walk([*change.trail, was])[-_TRAIL:]
        change.log(what, by, why, was, version)
        change.end_shares(by)

    @contextmanager
    def _change(self, name: str, *, create: bool = False, expected: int | None = None) -> Iterator[_Change]:
        """One transaction on one name; the snapshot follows once it is committed.

        `expected` is the version that must be live now (0: none), or Conflict.
        """
        with self._writing:
            with self.transaction() as connection:
                if connection.dialect.name == "postgresql":
                    # One writer at a time, as SQLite has it: else history's ids would not rise in commit order.
                    connection.execute(text("LOCK TABLE history IN EXCLUSIVE MODE"))
                if create:
                    self._ensure(connection, name)
                row = connection.execute(select(names).where(names.c.name == name).with_for_update()).first()
                if row is None:
                    raise _missing(name)
                change = _Change(
                    connection, row.id, row.name, row.live, json.loads(row.trail), row.next, self._clock, row.shared
                )
                change.shares, change.pinned, change.base = _shares(row), row.pinned, row.base
                unread = (connection.scalar(_LATEST) or 0) != self._snapshot.generation
                if not create and not change.versions():
                    raise _missing(name)
                _expect(change.name, change.live, expected)
                yield change
                if change.logged:
                    connection.execute(
                        update(names)
                        .where(names.c.id == change.id)
                        .values(
                            live=change.live,
                            trail=json.dumps(change.trail),
                            next=change.next,
                            shared=change.shared,
                            pinned=change.pinned,
                            base=change.base,
                            **_share_columns(change.shares),
                        )
                    )
                entry = _entry(change.live, change.versions(), change.shared, change.shares, change.pinned, change.base)
                generation = connection.scalar(_LATEST) or 0
            if unread:  # another process has changed other names, which this generation holds too
                self._snapshot = self._read()
                return
            entries = {key: value for key, value in self._snapshot.entries.items() if key != name}
            if entry is not None:
                entries[name] = entry
            self._snapshot = _Snapshot(generation, entries)

    def _ensure(self, connection: Connection, name: str) -> None:
        if connection.scalar(select(names.c.id).where(names.c.name == name)) is None:
            connection.execute(insert(names).values(name=name, live=None, trail="[]", next=1))

    def _read(self) -> _Snapshot:
        entries: dict[str, _Entry] = {}
        engine = self._reading
        if engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")  # three queries, one moment
        with engine.connect() as connection, connection.begin():
            generation = connection.scalar(_LATEST) or 0
            found: dict[int, dict[int, Adapter]] = {}
            rows = connection.execute(select(names)).all()
            by_id = {row.id: row for row in rows}
            for row in connection.execute(select(versions)):
                found.setdefault(row.name_id, {})[row.version] = _adapter(by_id[row.name_id].name, row)
            for key, there in found.items():
                row = by_id[key]
                entry = _entry(row.live, there, row.shared, _shares(row), row.pinned, row.base)
                if entry is not None:
                    entries[row.name] = entry
        return _Snapshot(generation, entries)


@dataclass(slots=True)
class _Change:
    """What a transaction holds of its name; `_change` writes it back."""

    connection: Connection
    id: int
    name: str
    live: int | None
    trail: list[int]
    next: int
    clock: Callable[[], float]
    shared: bool
    logged: bool = False
    shares: dict[str, tuple[int, float]] = field(default_factory=dict)
    pinned: int | None = None
    base: str | None = None

    def versions(self) -> dict[int, Adapter]:
        rows = self.connection.execute(select(versions).where(versions.c.name_id == self.id))
        return {row.version: _adapter(self.name, row) for row in rows}

    def end_shares(self, by: str, only: Container[int] | None = None) -> None:
        """The canary and the shadow stop; or those whose version is among `only`."""
        for kind in list(self.shares):
            if only is None or self.shares[kind][0] in only:
                self.end_share(kind, by, "")

    def end_share(self, kind: str, by: str, why: str) -> None:
        version, _ = self.shares.pop(kind)
        self.log(f"{kind}_end", by, why, version, None)

    def log(
        self,
        what: str,
        by: str,
        why: str,
        before: int | None,
        after: int | None,
        digest: str | None = None,
        weight: float | None = None,
    ) -> None:
        self.logged = True
        self.connection.execute(
            insert(history).values(
                name_id=self.id,
                who=shown(by, 256),
                what=what,
                why=shown(why, 2000),
                when=self.clock(),
                from_version=before,
                to_version=after,
                digest=digest,
                weight=weight,
            )
        )


def _entry(
    live: int | None,
    there: Mapping[int, Adapter],
    shared: bool,
    shares: Mapping[str, tuple[int, float]],
    pinned: int | None,
    base: str | None,
) -> _Entry | None:
    if not there:
        return None
    return _Entry(
        live=None if live is None else there[live],
        versions=there,
        digests={adapter.digest[:12]: adapter for adapter in there.values()},
        shared=shared,
        pinned=None if pinned is None else there.get(pinned or live or 0),
        is_pinned=pinned is not None,
        base=base,
        **{kind: Share(there[version], weight) for kind, (version, weight) in shares.items()},
    )


def _shares(row: Any) -> dict[str, tuple[int, float]]:
    """A row's canary and shadow, each a version and its weight."""
    found = {"canary": (row.canary_version, row.canary_weight), "shadow": (row.shadow_version, row.shadow_weight)}
    return {kind: share for kind, share in found.items() if share[0] is not None}


def _share_columns(shares: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for kind in ("canary", "shadow"):
        columns[f"{kind}_version"], columns[f"{kind}_weight"] = shares.get(kind, (None, None))
    return columns


def _adapter(name: str, row: Any) -> Adapter:
    return Adapter(
        name=name,
        version=row.version,
        digest=row.digest,
        rank=row.rank,
        base=row.base,
        target_modules=tuple(json.loads(row.target_modules)),
        nbytes=row.nbytes,
        created=row.created,
        checks=json.loads(row.checks or "{}"),
    )


def _walk(trail: list[int]) -> list[int]:
    """The trail without steps that go nowhere, which a deletion can leave: 1, 2, 1 without 2 is 1."""
    return [number for at, number in enumerate(trail) if at == 0 or trail[at - 1] != number]


def _expect(name: str, live: int | None, expected: int | None) -> None:
    if expected is None or expected == (live or 0):
        return
    now = f"v{live}" if live else "no version"
    raise Conflict(
        f"{now} of {name} is live and not v{expected}: somebody was faster; look again, then decide",
        code="version_mismatch",
    )


def _missing(public: str) -> NotFound:
    return NotFound(f"The model `{shown(public)}` does not exist.", code="model_not_found", param="model")
