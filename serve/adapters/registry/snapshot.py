"""What the registry held at one moment, as immutable dictionaries: what the hot path reads instead of the database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, case, func, select

from serve.adapters.adapter import Adapter
from serve.adapters.registry.tables import LATEST, history, names, versions
from serve.errors import NotFound
from serve.names import shown

_PINNED = re.compile(r"(?P<name>[^@]+)@(?:v(?P<version>[1-9][0-9]{0,8})|(?P<digest>[0-9a-f]{12})|(?P<alias>.+))")
# More names than this that changed at once are read as a whole.
MOST_FOLLOWED = 200


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a name's traffic, from 0 to 1, for a version that is not live."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class Entry:
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
    trail: tuple[int, ...] = ()  # which versions were live before, the last one last
    aliases: Mapping[str, Adapter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    generation: int
    entries: Mapping[str, Entry]
    # Names that were given up, and what their adapters are called now.
    moved: Mapping[str, str] = field(default_factory=dict)


class SnapshotReader:
    """Answers from `_snapshot`, which each change replaces; no method waits for anything."""

    _snapshot: Snapshot

    def frozen(self) -> SnapshotReader:
        """What there is now; later changes do not reach it."""
        reader = SnapshotReader()
        reader._snapshot = self._snapshot
        return reader

    def changed_since(self, before: SnapshotReader) -> set[str]:
        """The names that have other versions, shares or settings than they had."""
        old, new = before._snapshot.entries, self._snapshot.entries
        if old is new:
            return set()
        # Entries that were not read again are the same objects.
        changed = {name for name, entry in new.items() if old.get(name) is not entry}
        return changed | (old.keys() - new.keys())

    @property
    def generation(self) -> int:
        """Rises with each change, and survives a restart."""
        return self._snapshot.generation

    def live(self, name: str) -> Adapter | None:
        """The version that answers for `name`, if any."""
        entry = self._snapshot.entries.get(name)
        return entry.live if entry else None

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

    def before(self, name: str) -> int | None:
        """The version that a rollback would make live."""
        entry = self._snapshot.entries.get(name)
        return entry.trail[-1] if entry and entry.trail else None

    def aliases(self, name: str) -> Mapping[str, Adapter]:
        """What NAME@ALIAS means, by alias."""
        entry = self._snapshot.entries.get(name)
        return entry.aliases if entry else {}

    def moved_to(self, name: str) -> str | None:
        """What the adapter is called now that had this name until it was renamed."""
        return self._snapshot.moved.get(name)

    def former_names(self, name: str) -> list[str]:
        """The names that lead to this one."""
        return sorted(old for old, new in self._snapshot.moved.items() if new == name)

    def get(self, name: str, version: int) -> Adapter:
        """That very version."""
        entry = self._snapshot.entries.get(name)
        if entry is None or version not in entry.versions:
            raise missing(f"{name}@v{version}")
        return entry.versions[version]

    def resolve(self, public: str) -> Adapter:
        """NAME (its live version), NAME@vN, NAME@DIGEST12 or NAME@ALIAS."""
        entries, moved = self._snapshot.entries, self._snapshot.moved
        adapter: Adapter | None = None
        if pinned := _PINNED.fullmatch(public):
            entry = entries.get(moved.get(pinned["name"], pinned["name"]))
            if entry and pinned["version"]:
                adapter = entry.versions.get(int(pinned["version"]))
            elif entry and pinned["digest"]:
                adapter = entry.digests.get(pinned["digest"])
            elif entry:
                adapter = entry.aliases.get(pinned["alias"])
        elif entry := entries.get(moved.get(public, public)):
            adapter = entry.live
        if adapter is None:
            raise missing(public)
        return adapter

    def names(self) -> list[str]:
        """Every name that has a version."""
        return sorted(self._snapshot.entries)

    def versions(self, name: str) -> list[Adapter]:
        """The versions of a name, oldest first."""
        entry = self._snapshot.entries.get(name)
        if entry is None:
            raise missing(name)
        return [entry.versions[number] for number in sorted(entry.versions)]

    def adapters(self) -> list[Adapter]:
        """Every version of every name."""
        entries = self._snapshot.entries
        return [entries[name].versions[number] for name in sorted(entries) for number in sorted(entries[name].versions)]

    def current(self) -> list[Adapter]:
        """Each name's live version, its canary, its shadow, and its newest version, which is tried by its number."""
        entries = self._snapshot.entries.values()
        shares = [share.adapter for entry in entries for share in (entry.canary, entry.shadow) if share]
        newest = [entry.versions[max(entry.versions)] for entry in entries if entry.versions]
        live = [entry.live for entry in entries if entry.live]
        return list({adapter.id: adapter for adapter in (*live, *shares, *newest)}.values())

    def ids(self, name: str) -> dict[str, Adapter]:
        """The versions of a name by their ids; none where there is no such name."""
        entry = self._snapshot.entries.get(name)
        return {adapter.id: adapter for adapter in entry.versions.values()} if entry else {}

    def digests(self) -> set[str]:
        """Whose bytes must stay."""
        return {adapter.digest for adapter in self.adapters()}


def read_snapshot(connection: Connection) -> Snapshot:
    """All that the database holds now."""
    generation = connection.scalar(LATEST) or 0
    rows = {row.id: row for row in connection.execute(select(names))}
    adapters: dict[int, dict[int, Adapter]] = {}
    for row in connection.execute(select(versions)):
        adapters.setdefault(row.name_id, {})[row.version] = adapter_of(rows[row.name_id].name, row)
    entries = {rows[key].name: entry_of(rows[key], there, shares_of(rows[key])) for key, there in adapters.items()}
    return Snapshot(generation, entries, {row.name: row.moved_to for row in rows.values() if row.moved_to})


def follow_snapshot(connection: Connection, before: Snapshot) -> Snapshot:
    """What the database holds now, of which the names that changed since `before` are read, and no others.

    It is `before` itself where nothing did. Names that moved, and a database that was put back, are read as a whole.
    """
    since = select(
        history.c.name_id, func.max(history.c.id), func.max(case((history.c.what.startswith("rename"), 1), else_=0))
    )
    feed = connection.execute(since.where(history.c.id > before.generation).group_by(history.c.name_id)).all()
    if not feed:
        is_older = (connection.scalar(LATEST) or 0) < before.generation
        return read_snapshot(connection) if is_older else before
    changed, generation = [row[0] for row in feed], max(row[1] for row in feed)
    if len(changed) > MOST_FOLLOWED or any(row[2] for row in feed):
        return read_snapshot(connection)
    rows = connection.execute(select(names).where(names.c.id.in_(changed))).all()
    adapters: dict[int, dict[int, Adapter]] = {row.id: {} for row in rows}
    called = {row.id: row.name for row in rows}
    for row in connection.execute(select(versions).where(versions.c.name_id.in_(changed))):
        adapters[row.name_id][row.version] = adapter_of(called[row.name_id], row)
    gone = {called[key] for key, there in adapters.items() if not there}
    if len(rows) < len(changed) or gone & set(before.moved.values()):
        return read_snapshot(connection)  # the names that led to one that is gone are gone too
    entries = dict(before.entries)
    for name in gone:
        entries.pop(name, None)
    for row in rows:
        if there := adapters[row.id]:
            entries[row.name] = entry_of(row, there, shares_of(row))
    return Snapshot(generation, entries, before.moved)


def entry_of(row: Any, there: Mapping[int, Adapter], shares: Mapping[str, tuple[int, float]]) -> Entry:
    """The entry of a name that has the versions `there`; `row` has the columns of the table names."""
    aliases = json.loads(row.aliases or "{}") if isinstance(row.aliases, str | None) else row.aliases
    return Entry(
        live=None if row.live is None else there[row.live],
        versions=there,
        digests={adapter.digest[:12]: adapter for adapter in there.values()},
        shared=row.shared,
        pinned=None if row.pinned is None else there.get(row.pinned or row.live or 0),
        is_pinned=row.pinned is not None,
        base=row.base,
        trail=tuple(json.loads(row.trail) if isinstance(row.trail, str) else row.trail),
        # An older server that shares the registry may have deleted the version.
        aliases={alias: there[version] for alias, version in sorted(aliases.items()) if version in there},
        **{kind: Share(there[version], weight) for kind, (version, weight) in shares.items()},
    )


def shares_of(row: Any) -> dict[str, tuple[int, float]]:
    """A row's canary and shadow, each a version and its weight."""
    shares = {"canary": (row.canary_version, row.canary_weight), "shadow": (row.shadow_version, row.shadow_weight)}
    return {kind: share for kind, share in shares.items() if share[0] is not None}


def adapter_of(name: str, row: Any) -> Adapter:
    """The adapter that a row of the table versions says."""
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
        tags=tuple(json.loads(row.tags or "[]")),
    )


def missing(public: str) -> NotFound:
    """The error for a name or version that does not exist, as OpenAI says it."""
    return NotFound(f"The model `{shown(public)}` does not exist.", code="model_not_found", param="model")
