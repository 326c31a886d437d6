"""Work in the registry's database: what one server at a time has the claim of, and what a tenant has under way.

    Claims      claim, renew, release, hand over: batches, fine-tuning jobs, loops, golden runs
    WorkTable   and a tenant's quota and list, and the sweep of what ended long ago: batches, fine-tuning jobs

A user says which table it is, in which statuses a row is worked on, and how a row is read. A claim ends by itself: a
server that was killed keeps the others from its work until then. A server that shares its registry with nobody takes
its own claims back when it starts. All methods block.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    update,
)

from serve.adapters.registry.registry import Registry
from serve.errors import BadRequest, NotFound, QuotaExceeded
from serve.names import shown

# Rows of a tenant, those at their end too, and how long these are listed.
KEPT, KEPT_DAYS = 20_000, 90
# Rows that are read at a time to find those that a list shows.
_READ = 100
# How the names of machines begin that run work of a server and share no registry with it.
WORKER = "worker:"
UNCLAIMED: Mapping[str, None] = MappingProxyType({"claimed_by": None, "claimed_until": None})


class Limits(Protocol):
    """What a tenant may have; `open` is not at its end."""

    @property
    def open(self) -> int: ...


class Described(Protocol):
    """What the API lists."""

    def described(self) -> dict[str, Any]: ...


Item = TypeVar("Item")
Shown = TypeVar("Shown", bound=Described)


@dataclass(frozen=True, slots=True)
class Page(Generic[Shown]):
    """A part of a list, as OpenAI's API shows it."""

    rows: Sequence[Shown]
    has_more: bool

    def described(self) -> dict[str, Any]:
        rows = [row.described() for row in self.rows]
        ids = [row["id"] for row in rows] or [None]
        return {"object": "list", "data": rows, "first_id": ids[0], "last_id": ids[-1], "has_more": self.has_more}


class Claims(ABC, Generic[Item]):
    """The claims of a table's rows. `me` is this server's name, `clock` the time of day in seconds."""

    table: ClassVar[Table]
    # The statuses in which a row is worked on; without any: in each.
    worked_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, registry: Registry, *, me: str, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._me = me
        self._clock = clock

    @abstractmethod
    def _read(self, row: Row[Any]) -> Item:
        """One of `_rows`."""

    def _rows(self) -> Select[Any]:
        return select(self.table)

    def _is(self, id: str) -> ColumnElement[bool]:
        return self.table.c.id == id

    def claim(self, id: str, seconds: float) -> Item | None:
        """Take it for this server alone, for so long; again while it has it. None if another one has it, or its status
        is another."""
        columns, now = self.table.c, self._clock()
        free = or_(columns.claimed_until.is_(None), columns.claimed_until < now, columns.claimed_by == self._me)
        values = {"claimed_by": self._me, "claimed_until": now + seconds}
        with self._registry.adding() as connection:
            here = and_(self._is(id), free, self._is_worked_on())
            if not connection.execute(update(self.table).where(here).values(values)).rowcount:
                return None
            return self._one(connection, self._is(id))

    def release(self, id: str | None = None) -> None:
        """The end of a claim; without an id of every server's claims, where this one is alone."""
        by = self.table.c.claimed_by
        where = by.not_like(f"{WORKER}%") if id is None else and_(self._is(id), by == self._me)
        with self._registry.adding() as connection:
            connection.execute(update(self.table).where(where).values(dict(UNCLAIMED)))

    def held(self, id: str) -> Item | None:
        """It, while it is this server's to work on."""
        with self._registry.reading() as connection:
            return self._one(connection, self._is_mine(id))

    def hand_over(self, id: str, to: str, seconds: float) -> bool:
        """The claim is another one's from now on, for so long; False if it was not this one's."""
        values = {"claimed_by": to, "claimed_until": self._clock() + seconds}
        with self._registry.adding() as connection:
            return bool(connection.execute(update(self.table).where(self._is_mine(id)).values(values)).rowcount)

    def _claimed(self, connection: Connection, id: str) -> Item | None:
        """It, which nobody else changes until the transaction ends; None if it is not this server's to work on."""
        return self._one(connection, self._is_mine(id), lock=True)

    def _is_claimed(self, connection: Connection, id: str) -> bool:
        """A server works on it, so that what its state says is going on goes on."""
        where = and_(self._is(id), self.table.c.claimed_until > self._clock())
        return self._one(connection, where) is not None

    def _one(self, connection: Connection, where: ColumnElement[bool], *, lock: bool = False) -> Item | None:
        query = self._rows().where(where)
        row = connection.execute(query.with_for_update() if lock else query).first()
        return None if row is None else self._read(row)

    def _is_mine(self, id: str) -> ColumnElement[bool]:
        return and_(self._is(id), self.table.c.claimed_by == self._me, self._is_worked_on())

    def _is_worked_on(self) -> ColumnElement[bool]:
        return self.table.c.status.in_(self.worked_on) if self.worked_on else true()


class WorkTable(Claims[Shown]):
    """Work that tenants made, of which each may have so much under way."""

    what: ClassVar[str]
    # The statuses that are no end, what such work is called, and the code of the error when there is too much of it.
    not_ended: ClassVar[tuple[str, ...]]
    under_way: ClassVar[str]
    limit_code: ClassVar[str]

    def __init__(self, registry: Registry, limits: Limits, *, me: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(registry, me=me, clock=clock)
        self.limits = limits

    @abstractmethod
    def _values(self, work: Shown) -> Mapping[str, Any]:
        """The row of new work."""

    @abstractmethod
    def _missing(self, id: str) -> NotFound:
        """There is none with this id."""

    def _after_adding(self, connection: Connection, work: Shown) -> None:
        """Rows beside the new one."""

    def _before_forgetting(self, connection: Connection, ids: Select[Any]) -> None:
        """Rows beside those that go."""

    def add(self, work: Shown) -> None:
        """New work; QuotaExceeded if the tenant has as much under way as it may."""
        values = self._values(work)
        mine = self.table.c.tenant == values["tenant"]
        with self._registry.adding(values["tenant"]) as connection:
            count = _count(connection, self.table, mine, self.table.c.status.in_(self.not_ended))
            if count >= self.limits.open:
                raise QuotaExceeded(
                    f"this tenant has {count} {self.under_way}, and {self.limits.open} are the most: wait for one of "
                    "them, or cancel it",
                    code=self.limit_code,
                )
            if (count := _count(connection, self.table, mine)) >= KEPT:
                raise QuotaExceeded(
                    f"{count} {self.what} of this tenant are listed, and {KEPT} are the most: the oldest leave after "
                    f"{KEPT_DAYS} days"
                )
            connection.execute(insert(self.table).values(values))
            self._after_adding(connection, work)

    def get(self, tenant: str, id: str) -> Shown:
        """NotFound also for another tenant's."""
        with self._registry.reading() as connection:
            return self._own(connection, tenant, id)

    def page(self, tenant: str, *, after: str | None, limit: int) -> Page[Shown]:
        """A tenant's, the latest first; from behind the one with the id `after`."""
        return self._page(tenant, after, limit)

    def open(self) -> list[Shown]:
        """Every tenant's that are not at their end, the oldest first."""
        columns = self.table.c
        query = self._rows().where(columns.status.in_(self.not_ended)).order_by(columns.created, columns.id)
        with self._registry.reading() as connection:
            return [self._read(row) for row in connection.execute(query)]

    def sweep(self) -> None:
        """Drop what was made `KEPT_DAYS` ago and is at its end."""
        columns, oldest = self.table.c, self._clock() - 86_400 * KEPT_DAYS
        over = and_(columns.created < oldest, columns.status.not_in(self.not_ended))
        with self._registry.adding() as connection:
            self._before_forgetting(connection, select(columns.id).where(over))
            connection.execute(delete(self.table).where(over))

    def _own(self, connection: Connection, tenant: str, id: str, *, lock: bool = False) -> Shown:
        work = self._one(connection, and_(self._is(id), self.table.c.tenant == tenant), lock=lock)
        if work is None:
            raise self._missing(id)
        return work

    def _page(
        self, tenant: str, after: str | None, limit: int, *where: Any, fits: Callable[[Shown], bool] | None = None
    ) -> Page[Shown]:
        """`where` leaves out most of what does not fit."""
        query = self._rows().where(self.table.c.tenant == tenant, *where)
        most = limit if fits is None else max(limit, _READ)
        found: list[Shown] = []
        with self._registry.reading() as connection:
            while len(found) <= limit:
                rows = paged(connection, self.table, query, tenant, after, most, ascending=False)
                read = [self._read(row) for row in rows]
                found += read if fits is None else filter(fits, read)
                if len(rows) <= most:
                    break
                after = rows[-1].id
        return Page(found[:limit], len(found) > limit)


def paged(
    connection: Connection, rows: Table, query: Any, tenant: str, after: str | None, limit: int, ascending: bool
) -> list[Any]:
    """One row more than `limit`, if there is one; BadRequest if the tenant has no row `after`."""
    if after is not None:
        at = connection.scalar(select(rows.c.created).where(rows.c.id == after, rows.c.tenant == tenant))
        if at is None:
            raise BadRequest(f"after takes an id of this list, not {shown(after)}", param="after")
        created, id = rows.c.created, rows.c.id
        later = or_(created > at, and_(created == at, id > after))
        earlier = or_(created < at, and_(created == at, id < after))
        query = query.where(later if ascending else earlier)
    order = (rows.c.created, rows.c.id) if ascending else (rows.c.created.desc(), rows.c.id.desc())
    return [*connection.execute(query.order_by(*order).limit(limit + 1))]


def _count(connection: Connection, table: Table, *where: Any) -> int:
    return connection.scalar(select(func.count()).select_from(table).where(*where)) or 0
