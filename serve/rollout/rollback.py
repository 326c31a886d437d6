"""Automatic rollback: takes the traffic from a version that turned out bad.

A live version is rolled back to the version that was live before it; a canary is ended. The verdict on a canary and an
alert both come through here, so that together they roll an adapter back at most once an hour. Nothing is promoted here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from weakref import WeakValueDictionary

from serve.adapters.registry.registry import Registry
from serve.errors import Conflict, EngineUnavailable, LoradockError
from serve.events import MAX_EVIDENCE, Events, RollbackAttempted
from serve.events import ROLLBACK as WHO
from serve.rollout.lifecycle import Lifecycle

log = logging.getLogger(__name__)

SECONDS_BETWEEN = 3600.0
# So long it waits for the history; a version that does harm does not stay for a database that is slow.
HISTORY_SECONDS = 2.0


class Outcome(StrEnum):
    """What became of a rollback that was asked for."""

    ROLLED_BACK = "rolled_back"
    CANARY_ENDED = "canary_ended"
    NOT_SERVING = "not_serving"  # the version is neither live nor a canary (any more)
    TOO_SOON = "too_soon"  # this adapter was rolled back less than an hour ago
    NOWHERE = "nowhere"  # no earlier version was live
    FAILED = "failed"  # the change itself did not go through


@dataclass(frozen=True, slots=True)
class RollbackResult:
    """The outcome, and in a sentence why."""

    outcome: Outcome
    message: str

    @property
    def done(self) -> bool:
        """The version gets no more traffic, and did before."""
        return self.outcome in (Outcome.ROLLED_BACK, Outcome.CANARY_ENDED)


class AutomaticRollback:
    """Publishes every attempt but those of versions that had no traffic."""

    def __init__(
        self, lifecycle: Lifecycle, registry: Registry, events: Events, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._lifecycle = lifecycle
        self._registry = registry
        self._events = events
        self._clock = clock
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by adapter

    async def rollback(
        self,
        adapter: str,
        version: int,
        reason: str,
        evidence: Mapping[str, Any],
        *,
        tell_failure: bool = True,
    ) -> RollbackResult:
        """Take the traffic from `version` of the adapter of this full name; a LoradockError becomes a FAILED result.

        `reason` is one of a few words, and the metric's label; `evidence` goes to the history and the audit log.
        Whoever tries again and again tells nobody of later failures with `tell_failure`.
        """
        async with self._locks.setdefault(adapter, asyncio.Lock()):
            try:
                result = await self._rollback(adapter, version, f"{reason}: {_as_json(evidence)}")
            except LoradockError as error:
                result = RollbackResult(Outcome.FAILED, error.message)
        if result.outcome is Outcome.NOT_SERVING:
            return result
        log.warning("%s@v%d, %s: %s", adapter, version, reason, result.message)
        failed = result.outcome is Outcome.FAILED
        if tell_failure or not failed:
            outcome, status = result.outcome.value, 200 if result.done else 500 if failed else 409
            self._events.publish(
                RollbackAttempted(adapter, version, reason, outcome, result.message, evidence, result.done, status)
            )
        return result

    async def _rollback(self, adapter: str, version: int, why: str) -> RollbackResult:
        canary = self._registry.canary(adapter) if adapter in self._registry else None
        if canary and canary.adapter.version == version:
            await self._lifecycle.share(adapter, "canary", version, 0, by=WHO, why=why)
            return RollbackResult(Outcome.CANARY_ENDED, f"version {version} is no canary any more")
        live = self._registry.live(adapter) if adapter in self._registry else None
        if live is None or live.version != version:
            return RollbackResult(Outcome.NOT_SERVING, f"version {version} is neither live nor a canary")
        if minutes := await self._minutes_to_wait(adapter):
            return RollbackResult(
                Outcome.TOO_SOON,
                f"version {version} stays live: the adapter was rolled back less than an hour ago, "
                f"look at it yourself (the next rollback is possible in {minutes} minutes)",
            )
        before = self._registry.before(adapter)
        if before is None or before > version:
            # The version before has a later number: somebody went back by hand, and a rollback would undo that.
            return RollbackResult(
                Outcome.NOWHERE, f"version {version} stays live: no earlier version was live before it"
            )
        try:
            target = await self._lifecycle.rollback(adapter, by=WHO, expected=version, why=why)
        except Conflict as moved:
            return RollbackResult(Outcome.NOT_SERVING, moved.message)
        return RollbackResult(Outcome.ROLLED_BACK, f"rolled back from version {version} to {target.version}")

    async def _minutes_to_wait(self, adapter: str) -> int:
        """Read from the history, so that a restart does not forget it; 0 where that does not answer soon."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._minutes_in_history, adapter), HISTORY_SECONDS)
        except (TimeoutError, EngineUnavailable) as error:
            log.warning("whether %s was rolled back lately cannot be read: %s", adapter, error or "no answer")
            return 0

    def _minutes_in_history(self, adapter: str) -> int:
        since = self._clock() - SECONDS_BETWEEN
        for row in reversed(self._registry.history(adapter)):
            if row["when"] < since:
                break
            if row["who"] == WHO and row["what"] == "rollback":
                return 1 + int((row["when"] - since) // 60)
        return 0


def _as_json(evidence: Mapping[str, Any]) -> str:
    return json.dumps(evidence, default=str)[:MAX_EVIDENCE]
