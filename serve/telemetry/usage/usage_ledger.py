"""What was used, by day, tenant and adapter, in the registry's database; servers of one registry add up there.

Requests are added up in memory when they end, on the event loop, and written every WRITE_SECONDS and at the end: a
server that is killed loses what it counted since. Days are UTC's, by when a request came. Days older than `keep_days`
are deleted, so there are at most as many rows as days, tenants and adapters.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import usage as table
from serve.asgi.exchange import Exchange
from serve.errors import LoradockError
from serve.telemetry.prices import Price, price_for

log = logging.getLogger(__name__)

WRITE_SECONDS = 15.0
DAY, DAY_SECONDS = "%Y-%m-%d", 86_400


@dataclass(slots=True)
class Usage:
    """Of some requests; `cached_tokens` are among the `prompt_tokens`, `cost` is in the configuration's currency."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    engine_seconds: float = 0.0
    cost: float = 0.0

    @classmethod
    def of(cls, exchange: Exchange, prices: Sequence[Price]) -> Usage:
        """What the engine did for one request, however it ended."""
        prompt = exchange.prompt_tokens
        tokens = prompt, min(exchange.cached_tokens, prompt), exchange.generated_tokens
        seconds = exchange.engine_seconds
        return cls(1, *tokens, seconds, price_for(prices, exchange.adapter).cost(*tokens, seconds))

    def add(self, other: Usage) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.engine_seconds += other.engine_seconds
        self.cost += other.cost


COUNTS = tuple(field.name for field in fields(Usage))
Key = tuple[str, str, str]


class UsageLedger:
    """`take` belongs to the event loop; `write` and `rows` wait for the database, so they belong to other threads."""

    def __init__(self, registry: Registry, *, keep_days: int = 400, clock: Callable[[], float] = time.time) -> None:
        self._registry, self._keep_days, self._clock = registry, keep_days, clock
        self._pending: dict[Key, Usage] = {}
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._tidied = ""

    def take(self, exchange: Exchange, used: Usage) -> None:
        """Count a request that has ended."""
        key = (_day(int((exchange.began or self._clock()) // DAY_SECONDS)), exchange.tenant, exchange.adapter)
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
        """Write what was counted until now; what the database does not take is kept for the next time."""
        with self._writing:
            with self._counting:
                taken, self._pending = self._pending, {}
            try:
                self._write(taken)
            except BaseException:
                with self._counting:
                    for key, used in taken.items():
                        self._pending.setdefault(key, Usage()).add(used)
                raise

    def rows(self, month: str, tenant: str | None = None) -> list[dict[str, Any]]:
        """What was written for a month (YYYY-MM), by tenant and adapter: what costs most first."""
        sums = [func.sum(table.c[name]).label(name) for name in COUNTS]
        query = select(table.c.tenant, table.c.adapter, *sums).where(table.c.day.like(f"{month}-%"))
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        query = query.group_by(table.c.tenant, table.c.adapter)
        with self._registry.reading() as connection:
            rows = [_plain(row) for row in connection.execute(query).mappings()]
        return sorted(rows, key=lambda row: (-row["cost"], -row["engine_seconds"], row["tenant"], row["adapter"]))

    def _write(self, taken: dict[Key, Usage]) -> None:
        today = datetime.fromtimestamp(self._clock(), UTC)
        oldest = (today - timedelta(days=self._keep_days)).strftime(DAY)
        tidies = self._tidied != today.strftime(DAY)
        if not taken and not tidies:
            return
        with self._registry.adding() as connection:
            insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            # In one order on all servers, so that two of them never wait for one another.
            for (day, tenant, adapter), used in sorted(taken.items(), key=lambda item: item[0]):
                new = insert(table).values(day=day, tenant=tenant, adapter=adapter, **asdict(used))
                more = {name: table.c[name] + new.excluded[name] for name in COUNTS}
                keys = [table.c.day, table.c.tenant, table.c.adapter]
                connection.execute(new.on_conflict_do_update(index_elements=keys, set_=more))
            if tidies:
                connection.execute(delete(table).where(table.c.day < oldest))
        self._tidied = today.strftime(DAY)


@lru_cache(maxsize=4)
def _day(number: int) -> str:
    """A day of UTC by its number since 1970."""
    return datetime.fromtimestamp(number * DAY_SECONDS, UTC).strftime(DAY)


def _plain(row: Any) -> dict[str, Any]:
    """PostgreSQL's sums of whole numbers are decimals."""
    numbers = {name: float(row[name]) if name in ("engine_seconds", "cost") else int(row[name]) for name in COUNTS}
    return {"tenant": row["tenant"], "adapter": row["adapter"], **numbers}
