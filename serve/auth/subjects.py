"""Who came with a token of the identity provider: a row each, for batches and jobs that go on without them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import subjects as table
from serve.auth.auth import Caller, Scope
from serve.auth.rate_limits import UNLIMITED, Limits
from serve.errors import LoradockError

log = logging.getLogger(__name__)

# So long a subject's work goes on after its last token was seen; a row is written again after this.
HELD_SECONDS, WRITE_SECONDS = 86_400.0, 600.0
REFRESH_SECONDS = 20.0


class Subjects:
    """`get` never meets the database; the others block. `limits` are every subject's; `clock` is the time of day."""

    def __init__(
        self, registry: Registry, limits: Limits = UNLIMITED, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._clock = clock
        self._known: dict[str, tuple[Caller, float]] = {}
        self.refresh()

    def get(self, id: str) -> Caller | None:
        """The subject, with the rights of its last token."""
        caller, seen = self._known.get(id, (None, 0.0))
        return caller if self._clock() - seen < HELD_SECONDS else None

    def note(self, caller: Caller) -> None:
        """It came with a token now."""
        now = self._clock()
        known, seen = self._known.get(caller.key, (None, 0.0))
        if known == caller and now - seen < WRITE_SECONDS:
            return
        row = {"tenant": caller.tenant, "name": caller.name, "scopes": json.dumps(sorted(caller.scopes)), "seen": now}
        self._known[caller.key] = (caller, now)
        try:
            self._write(caller.key, caller.tenant, row, now)
        except LoradockError as error:  # the token is good; only its work may not outlive a restart
            log.warning("a subject of the identity provider is not written down: %s", error.message)

    def _write(self, id: str, tenant: str, row: dict[str, Any], now: float) -> None:
        with self._registry.adding(tenant) as connection:
            connection.execute(delete(table).where((table.c.id == id) | (table.c.seen < now - HELD_SECONDS)))
            connection.execute(insert(table).values(id=id, **row))

    def refresh(self) -> None:
        """Read what other servers noted."""
        query = select(table).where(table.c.seen > self._clock() - HELD_SECONDS)
        with self._registry.reading() as connection:
            rows = connection.execute(query).all()
        self._known = {
            row.id: (
                Caller(row.name, frozenset(map(Scope, json.loads(row.scopes))), row.tenant, row.id, self._limits),
                row.seen,
            )
            for row in rows
        }

    async def run(self) -> None:
        """`refresh`, now and then."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await asyncio.to_thread(self.refresh)
