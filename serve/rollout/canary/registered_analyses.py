"""What each server that compares a canary with the live version may spend of the canary's alpha.

Every server compares what it answers itself, and any of them may find the canary worse, or proved. So each registers
the analysis that it begins, and the n-th of two versions gets 1/(n(n+1)) of alpha: the parts add up to less than 1,
however many servers come and go, whatever their clocks say, and an analysis that begins anew spends anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import delete, func, insert, select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import canary_analyses as table
from serve.adapters.registry.tables import names
from serve.names import tenant_of

# No canary goes on for so long.
KEPT_SECONDS = 400 * 86_400.0


class RegisteredAnalyses:
    """All of it blocks. Without `shared` this is the registry's only server, which has all of alpha."""

    def __init__(self, registry: Registry, *, me: str, shared: bool, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._me = me
        self._shared = shared
        self._clock = clock

    def register(self, adapter: str, live: int, canary: int) -> float:
        """The part of alpha that the analysis which begins here now may spend."""
        if not self._shared:
            return 1.0
        now = self._clock()
        with self._registry.adding(tenant_of(adapter)) as connection:
            id = connection.scalar(select(names.c.id).where(names.c.name == adapter))
            if id is None:
                return 1.0
            columns = table.c
            connection.execute(delete(table).where(columns.when < now - KEPT_SECONDS))
            same = (columns.name_id == id, columns.live == live, columns.canary == canary)
            number = (connection.scalar(select(func.max(columns.number)).where(*same)) or 0) + 1
            row = {"name_id": id, "live": live, "canary": canary, "number": number, "server": self._me, "when": now}
            connection.execute(insert(table).values(**row))
        return 1 / (number * (number + 1))
