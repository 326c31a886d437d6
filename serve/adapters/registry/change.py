"""One transaction on one name of the registry: what it reads of the name, changes, and writes back with its history."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, delete, func, insert, select, update

from serve.adapters.adapter import Adapter
from serve.adapters.registry.snapshot import Entry, adapter_of, entry_of, missing, shares_of
from serve.adapters.registry.tables import history, names, versions
from serve.errors import Conflict
from serve.names import shown

_TRAIL = 64
# What may happen to a name. The dashboard has words for each.
KINDS = frozenset((
    "add", "delete", "promote", "rollback", "fallback", "unload", "share", "unshare", "canary", "canary_end", "shadow",
    "shadow_end", "pin", "unpin", "alias", "alias_end", "tag", "drift", "drift_accepted", "golden_hold",
    "golden_fell", "rename", "rename_end", "loop", "validated", "validation_hold",
))  # fmt: skip


@dataclass(slots=True)
class Change:
    """A name's row, locked; `save` writes it back if anything was logged."""

    connection: Connection
    clock: Callable[[], float]
    id: int
    name: str
    live: int | None
    trail: list[int]
    next: int
    shared: bool
    pinned: int | None
    base: str | None
    shares: dict[str, tuple[int, float]]
    aliases: dict[str, int]
    logged: bool = False
    others: bool = False  # rows of other names have changed too

    @classmethod
    def of(cls, connection: Connection, name: str, clock: Callable[[], float], *, create: bool) -> Self:
        """The name's row; where `create`, made if it is missing, else NotFound unless it has a version."""
        if create and connection.scalar(select(names.c.id).where(names.c.name == name)) is None:
            connection.execute(insert(names).values(name=name, live=None, trail="[]", next=1))
        row = connection.execute(select(names).where(names.c.name == name).with_for_update()).first()
        if row is None:
            raise missing(name)
        if row.moved_to:
            raise Conflict(
                f"{shown(name)} was renamed to {shown(row.moved_to)}: use that name, or remove the old one first",
                code="renamed",
            )
        change = cls(
            connection, clock, row.id, row.name, row.live, json.loads(row.trail), row.next, row.shared, row.pinned,
            row.base, shares_of(row), json.loads(row.aliases or "{}"),
        )  # fmt: skip
        if not create and not change.versions():
            raise missing(name)
        return change

    def save(self) -> None:
        """Write the row back."""
        if not self.logged:
            return
        columns: dict[str, Any] = {}
        for kind in ("canary", "shadow"):
            columns[f"{kind}_version"], columns[f"{kind}_weight"] = self.shares.get(kind, (None, None))
        self.connection.execute(
            update(names)
            .where(names.c.id == self.id)
            .values(
                live=self.live,
                trail=json.dumps(self.trail),
                next=self.next,
                shared=self.shared,
                pinned=self.pinned,
                base=self.base,
                aliases=json.dumps(self.aliases) if self.aliases else None,
                **columns,
            )
        )

    def kept(self) -> Sequence[Any]:
        """Names, digests and bytes of all versions that the name's tenant has."""
        prefix = self.name[: self.name.rfind("/") + 1]
        # SQLite's LIKE takes capitals for small letters.
        mine = func.substr(names.c.name, 1, len(prefix)) == prefix if prefix else ~names.c.name.contains("/")
        query = select(names.c.name, versions.c.digest, versions.c.nbytes).join(names, names.c.id == versions.c.name_id)
        return self.connection.execute(query.where(mine)).all()

    def entry(self) -> Entry | None:
        """The name as the snapshot will have it; None when it has no version left."""
        there = self.versions()
        return entry_of(self, there, self.shares) if there else None

    def version(self, number: int) -> Adapter:
        """That version, or NotFound."""
        there = self.versions()
        if number not in there:
            raise missing(f"{self.name}@v{number}")
        return there[number]

    def point(self, version: int, what: str, by: str, why: str) -> None:
        """Make `version` the live one."""
        if self.live == version:
            return
        was, self.live = self.live, version
        if was is not None:
            self.trail = without_repeats([*self.trail, was])[-_TRAIL:]
        elif self.trail and self.trail[-1] == version:
            self.trail.pop()  # it was unloaded: to roll back to it would go nowhere
        self.log(what, by, why, was, version)
        self.end_shares(by)

    def unload(self, by: str, why: str) -> int:
        """No version is live any more; the one that was is the next that a rollback would make live."""
        if self.live is None:
            raise missing(self.name)
        was, self.live = self.live, None
        self.trail = without_repeats([*self.trail, was])[-_TRAIL:]
        self.log("unload", by, why, was, None)
        self.end_shares(by)
        return was

    def rename(self, new: str, by: str, why: str) -> None:
        """The row gets another name, and the old one leads to it."""
        taken = self.connection.execute(select(names).where(names.c.name == new).with_for_update()).first()
        check_rename(self.name, new, self.shares, taken is not None and taken.moved_to != self.name)
        self.connection.execute(delete(names).where(names.c.name == new))
        self.connection.execute(update(names).where(names.c.id == self.id).values(name=new))
        self.connection.execute(update(names).where(names.c.moved_to == self.name).values(moved_to=new))
        self.connection.execute(insert(names).values(name=self.name, live=None, trail="[]", next=1, moved_to=new))
        self.log("rename", by, why, None, None, label=f"{self.name} to {new}")
        self.name, self.others = new, True

    def end_move(self, old: str, by: str) -> None:
        """A name that led here leads nowhere any more."""
        self.connection.execute(delete(names).where((names.c.name == old) & (names.c.moved_to == self.name)))
        self.log("rename_end", by, "", None, None, label=old)
        self.others = True

    def end_moves(self) -> None:
        """No name leads here any more."""
        gone = self.connection.execute(delete(names).where(names.c.moved_to == self.name))
        self.others = self.others or bool(gone.rowcount)

    def check_unused(self, version: int, count: int) -> None:
        """Conflict, if it is live beside others of `count`, or an alias names it: then it goes by force only."""
        if version == self.live and count > 1:
            raise Conflict(
                f"{shown(self.name)}@v{version} is live; promote another version first, or delete it with force",
                code="live",
            )
        if alias := next((alias for alias, target in self.aliases.items() if target == version), None):
            raise Conflict(
                f"{shown(self.name)}@{alias} is v{version}; move the alias first, or delete it with force",
                code="aliased",
            )

    def versions(self) -> dict[int, Adapter]:
        rows = self.connection.execute(select(versions).where(versions.c.name_id == self.id))
        return {row.version: adapter_of(self.name, row) for row in rows}

    def end_shares(self, by: str, only: Container[int] | None = None) -> None:
        """The canary and the shadow stop; or those whose version is among `only`."""
        for kind in list(self.shares):
            if only is None or self.shares[kind][0] in only:
                self.end_share(kind, by, "")

    def end_share(self, kind: str, by: str, why: str) -> None:
        version, _ = self.shares.pop(kind)
        self.log(f"{kind}_end", by, why, version, None)

    def end_aliases(self, by: str, only: Container[int]) -> None:
        """Those stop whose version is among `only`."""
        for alias, version in list(self.aliases.items()):
            if version in only:
                self.end_alias(alias, by, "")

    def end_alias(self, alias: str, by: str, why: str) -> None:
        self.log("alias_end", by, why, self.aliases.pop(alias), None, label=alias)

    def log(
        self,
        what: str,
        by: str,
        why: str,
        before: int | None,
        after: int | None,
        digest: str | None = None,
        weight: float | None = None,
        label: str | None = None,
    ) -> None:
        if what not in KINDS:
            raise ValueError(f"{what} is no kind of change: add it to KINDS, and give it words in the dashboard")
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
                label=label,
            )
        )


def without_repeats(trail: list[int]) -> list[int]:
    """The trail without steps that go nowhere, which a deletion can leave: 1, 2, 1 without 2 is 1."""
    return [number for at, number in enumerate(trail) if at == 0 or trail[at - 1] != number]


def check_rename(name: str, new: str, shares: Iterable[str], is_taken: bool) -> None:
    """Conflict, if the adapter has `shares`, or somebody else the new name."""
    if kind := min(shares, default=None):
        raise Conflict(f"{shown(name)} has a {kind}: end it first, since its evidence is by name")
    if is_taken:
        raise Conflict(f"{shown(new)} is an adapter, or was one whose history is kept: choose another name", param="to")


def check_expected(name: str, live: int | None, expected: int | None) -> None:
    """Conflict, unless the `expected` version is live (0: none); None expects nothing."""
    if expected is None or expected == (live or 0):
        return
    now = f"v{live}" if live else "no version"
    raise Conflict(
        f"{now} of {name} is live and not v{expected}: somebody was faster; look again, then decide",
        code="version_mismatch",
    )
