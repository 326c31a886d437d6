"""What was used, by day, tenant and adapter, in the registry's database; servers of one registry add up there.

What each lease of an engine came to is added up in memory when it ends, on the event loop, and written every
WRITE_SECONDS and at the end: a server that is killed loses what it counted since. Days are UTC's, by when a request
came. Days older than `keep_days` are deleted, so there are at most as many rows as days, tenants and adapters; and of
`usage_causes`, which has what it was for, as many for each cause. What an earlier release wrote has no cause.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Self

from sqlalchemy import Connection, Select, Table, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import usage as table
from serve.adapters.registry.tables import usage_causes, usage_writes
from serve.asgi.exchange import count_cached_tokens, count_generated_tokens, count_prompt_tokens, sum_engine_seconds
from serve.engine.payer import Work
from serve.errors import LoradockError
from serve.telemetry.prices import Price, price_for

log = logging.getLogger(__name__)

WRITE_SECONDS = 15.0
PIECE_ROWS = 500  # of one transaction, so that others have their turn
DAY, DAY_SECONDS = "%Y-%m-%d", 86_400


@dataclass(slots=True)
class Usage:
    """Of some answers; `cached_tokens` are among the `prompt_tokens`, `cost` is in the configuration's currency."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    engine_seconds: float = 0.0
    cost: float = 0.0

    @classmethod
    def of(cls, work: Work, prices: Sequence[Price]) -> Usage:
        """What the engine did for one answer, however it ended."""
        prompt = count_prompt_tokens(work.generations)
        cached = min(count_cached_tokens(work.generations), prompt)
        tokens = prompt, cached, count_generated_tokens(work.generations)
        seconds = sum_engine_seconds(work.generations)
        return cls(1, *tokens, seconds, price_for(prices, work.adapter).cost(*tokens, seconds))

    def add(self, other: Usage) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.engine_seconds += other.engine_seconds
        self.cost += other.cost


COUNTS = tuple(field.name for field in fields(Usage))
Key = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is written in one transaction, once."""

    id: str
    rows: Sequence[tuple[Key, Usage]]

    @classmethod
    def of(cls, rows: Sequence[tuple[Key, Usage]]) -> Self:
        return cls(secrets.token_hex(16), rows)


class UsageLedger:
    """`take` belongs to the event loop; `write` and `rows` wait for the database, so they belong to other threads."""

    def __init__(self, registry: Registry, *, keep_days: int = 400, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._keep_days = keep_days
        self._clock = clock
        self._pending: dict[Key, Usage] = {}
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._doubtful: _Piece | None = None
        self._tidied = ""

    def take(self, work: Work, used: Usage) -> None:
        """Count an answer that has ended."""
        day = _day(int((work.began or self._clock()) // DAY_SECONDS))
        key = (day, work.payer.tenant, work.adapter, work.payer.cause.value)
        with self._counting:
            known = self._pending.get(key)
            if known is None:
                known = self._pending[key] = Usage()
            known.add(used)

    async def run(self) -> None:
        """Write again and again, for as long as the server runs; what the database does not take is written later."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await asyncio.to_thread(self.write)
            except LoradockError as error:
                log.warning("the usage of the last %.0f s is written later: %s", WRITE_SECONDS, error.message)

    def close(self) -> None:
        """Write the rest."""
        try:
            self.write()
        except LoradockError as error:
            log.error("the usage since the last %.0f s was not written: %s", WRITE_SECONDS, error.message)

    def write(self) -> None:
        """Write what was counted until now, in pieces; what the database does not take is kept for the next time."""
        with self._writing:
            with self._counting:
                taken, self._pending = self._pending, {}
            # In one order on all servers, so that two of them never wait for one another.
            rows = sorted(taken.items())
            pieces = [_Piece.of(rows[at : at + PIECE_ROWS]) for at in range(0, len(rows), PIECE_ROWS)]
            # Whether the database took the one that failed last is not known: it is sent again as it was.
            pieces = [*filter(None, [self._doubtful]), *pieces]
            self._doubtful = None
            while pieces:
                try:
                    self._add(pieces[0])
                except BaseException:
                    self._doubtful = pieces.pop(0)
                    with self._counting:
                        for key, used in (row for piece in pieces for row in piece.rows):
                            self._pending.setdefault(key, Usage()).add(used)
                    raise
                del pieces[0]
            self._tidy()

    def rows(self, month: str, tenant: str | None = None) -> list[dict[str, Any]]:
        """What was written for a month (YYYY-MM), by tenant and adapter: what costs most first. `causes` is a part of
        each by what it was for."""
        with self._registry.reading(together=True) as connection:
            rows = {
                (row["tenant"], row["adapter"]): _plain(row) | {"causes": {}}
                for row in connection.execute(_summed(table, month, tenant)).mappings()
            }
            for part in connection.execute(_summed(usage_causes, month, tenant, "cause")).mappings():
                rows[part["tenant"], part["adapter"]]["causes"][part["cause"]] = _numbers(part)
        order = ("tenant", "adapter")
        return sorted(rows.values(), key=lambda row: (-row["cost"], -row["engine_seconds"], *map(row.get, order)))

    def _add(self, piece: _Piece) -> None:
        with self._registry.adding() as connection:
            insert = _insert(connection)
            if connection.scalar(select(usage_writes.c.id).where(usage_writes.c.id == piece.id)):
                return
            connection.execute(insert(usage_writes).values(id=piece.id, when=self._clock()))
            for counts in (table, usage_causes):
                new = insert(counts)
                more = {name: counts.c[name] + new.excluded[name] for name in COUNTS}
                added = new.on_conflict_do_update(index_elements=list(counts.primary_key), set_=more)
                connection.execute(added, [_named(key, counts) | asdict(used) for key, used in piece.rows])

    def _tidy(self) -> None:
        """Once a day delete what is too old."""
        today = datetime.fromtimestamp(self._clock(), UTC)
        if self._tidied == today.strftime(DAY):
            return
        oldest = (today - timedelta(days=self._keep_days)).strftime(DAY)
        with self._registry.adding() as connection:
            for each in (table, usage_causes):
                connection.execute(delete(each).where(each.c.day < oldest))
            connection.execute(delete(usage_writes).where(usage_writes.c.when < self._clock() - 2 * DAY_SECONDS))
        self._tidied = today.strftime(DAY)


@lru_cache(maxsize=4)
def _day(number: int) -> str:
    """A day of UTC by its number since 1970."""
    return datetime.fromtimestamp(number * DAY_SECONDS, UTC).strftime(DAY)


def _insert(connection: Connection) -> Callable[[Table], Any]:
    return postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert


def _named(key: Key, counts: Table) -> dict[str, str]:
    """The columns of `counts` that name the row of this key."""
    return {column.name: part for column, part in zip(counts.primary_key, key, strict=False)}


def _summed(counts: Table, month: str, tenant: str | None, *more: str) -> Select[Any]:
    """The sums of a month, by tenant, adapter, and what else names a row."""
    by = [counts.c[name] for name in ("tenant", "adapter", *more)]
    query = select(*by, *(func.sum(counts.c[name]).label(name) for name in COUNTS))
    query = query.where(counts.c.day.like(f"{month}-%")).group_by(*by)
    return query if tenant is None else query.where(counts.c.tenant == tenant)


def _plain(row: Any) -> dict[str, Any]:
    return {"tenant": row["tenant"], "adapter": row["adapter"], **_numbers(row)}


def _numbers(row: Any) -> dict[str, Any]:
    """PostgreSQL's sums of whole numbers are decimals."""
    return {name: float(row[name]) if name in ("engine_seconds", "cost") else int(row[name]) for name in COUNTS}
