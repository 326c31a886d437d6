"""Which changes of adapters wait for which.

    change(name)    one change of an adapter at a time: from the look at what serves, over the registry's transaction,
                    until its engine is told. Never held while bytes are hashed, sent, loaded or probed, nor while
                    anybody waits for an engine: a rollback waits for transactions alone.
    pins            the count of an engine's pins together with the transaction that adds one; taken within `change`
    everything()    no change at all: a base swap holds it from its last look at the adapters until the new engine
                    serves. Changes that have begun end first, and those that come wait.

Three things need none of them: the registry compares a change's `expected` version and counts what a tenant keeps
within its transaction, and what another server has changed is adopted in one go on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class ChangeLocks:
    """For one event loop."""

    def __init__(self) -> None:
        self._names: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.pins = asyncio.Lock()
        # Held by `everything`; each change passes it once.
        self._entrance = asyncio.Lock()
        self._changes = 0
        self._unchanged = asyncio.Event()
        self._unchanged.set()

    @asynccontextmanager
    async def change(self, name: str) -> AsyncIterator[None]:
        async with self._entrance:
            self._changes += 1
            self._unchanged.clear()
        try:
            async with self._names.setdefault(name, asyncio.Lock()):
                yield
        finally:
            self._changes -= 1
            if not self._changes:
                self._unchanged.set()

    @asynccontextmanager
    async def everything(self) -> AsyncIterator[None]:
        async with self._entrance:
            await self._unchanged.wait()
            yield
