"""Several servers on one registry: each sees what another has changed before it answers the next request.

A request waits for a look at the registry that began after it came: one small query, shared by all that wait. So
whoever has been answered by a new version, by any server, is never answered by the old one again; and a change that
was acknowledged by one server holds on all. Between requests the registry is looked at twice a second, and what is new
is loaded before somebody asks for it.

While the registry does not answer, requests are answered from what was read last: then nothing can be changed either.
A name that was not read by then may have been pushed on another server, so it is a 503 and not a 404.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from serve.adapters.registry.registry import Registry, Stamp
from serve.auth.keys import Keys
from serve.errors import EngineUnavailable, LoradockError
from serve.rollout.lifecycle import Lifecycle

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# A look that takes longer is not waited for.
LOOK_SECONDS = 2.0


class RegistrySync:
    """This server's view of a registry that others change too. `poll` runs until it is cancelled."""

    def __init__(self, registry: Registry, keys: Keys, lifecycle: Lifecycle) -> None:
        # Why the registry cannot be looked at, while it cannot.
        self.problem = ""
        self._registry = registry
        self._keys = keys
        self._lifecycle = lifecycle
        # One query at a time, and not behind what other threads do: a database that hangs takes this one alone.
        self._look_thread = ThreadPoolExecutor(1, "registry-look")
        self._stamp = Stamp()
        self._looking: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        # When the look that is under way began.
        self._since: float | None = None

    async def fresh(self) -> None:
        """Returns once every change is seen that was committed before this call; it raises nothing."""
        if self._since is not None and time.monotonic() - self._since > LOOK_SECONDS:
            return
        if self._next is None:
            self._next = asyncio.create_task(self._look(self._looking))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await asyncio.shield(self._next)
        except TimeoutError:
            self._unseen("it did not answer in time")

    def doubted(self, error: LoradockError) -> LoradockError:
        """The error that says so, if it is about a name that is unknown here while the registry cannot be looked at."""
        if not self.problem or error.code != "model_not_found":
            return error
        return EngineUnavailable(
            f"{error.message} This server knows no such name, but cannot look at the registry now: retry shortly"
        )

    async def poll(self) -> None:
        """Look at the registry also when nobody asks."""
        while True:
            await self.fresh()
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """Look no more."""
        self._look_thread.shutdown(wait=False, cancel_futures=True)

    async def _look(self, before: asyncio.Task[None] | None) -> None:
        """One query, begun when the one before it has ended; and what follows, if it says something new."""
        if before is not None:
            await asyncio.wait([before])
        # Who comes from now on needs a look that begins later.
        self._looking, self._next = asyncio.current_task(), None
        self._since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            stamp = await loop.run_in_executor(self._look_thread, self._registry.stamp)
            if stamp != self._stamp:
                await loop.run_in_executor(self._look_thread, self._read, stamp)
                self._lifecycle.adopt()
                self._stamp = stamp
            if self.problem:
                log.info("the registry is looked at again")
            self.problem = ""
        except LoradockError as error:
            self._unseen(str(error))
        except Exception as error:  # requests wait for this look: they are answered from what was read last
            if not self.problem:
                log.exception("a look at the registry failed")
            self._unseen(f"{type(error).__name__}: {error}")
        finally:
            self._since = None

    def _read(self, stamp: Stamp) -> None:
        if stamp.names != self._stamp.names:
            self._registry.refresh()
        if stamp.keys != self._stamp.keys:
            self._keys.refresh()

    def _unseen(self, why: str) -> None:
        if not self.problem:
            log.error("the registry cannot be looked at, answers go on from what was read last: %s", why)
        self.problem = why
