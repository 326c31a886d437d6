"""Acts on the verdict on a canary, as the adapter's policy says, and writes down drift alarms.

An action that fails is tried again, with longer and longer pauses, until it is done or somebody has overruled it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.registry.registry import Registry
from serve.asgi.inbox import Inbox
from serve.errors import LoradockError
from serve.events import MAX_EVIDENCE, WATCHER, CanaryJudged, CanaryVerdict, DriftAlarm, Events, VerdictActedOn
from serve.events import REFEREE as WHO
from serve.rollout.canary.canary_monitor import CanaryMonitor, Tries
from serve.rollout.golden.golden_verdicts import GoldenVerdicts
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import PROMOTE, ROLLBACK, Policies
from serve.rollout.rollback import HISTORY_SECONDS, AutomaticRollback, Outcome
from serve.sequential.sequential_test import Verdict

log = logging.getLogger(__name__)

# The pause before the second attempt; each further one is twice as long.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


@dataclass(slots=True, eq=False)
class _Action:
    """What is done about one verdict."""

    verdict: CanaryVerdict
    # Those that failed.
    attempts: int = 0


class RolloutController(Collector):
    """`hear` and `note_alarm` are for any thread, the rest for the event loop. `golden` may have a verdict wait, and
    `tries` may have a loop act on it."""

    def __init__(
        self,
        rollback: AutomaticRollback,
        lifecycle: Lifecycle,
        registry: Registry,
        canaries: CanaryMonitor,
        golden: GoldenVerdicts,
        tries: Tries,
        policies: Policies,
        events: Events,
    ) -> None:
        self._rollback = rollback
        self._lifecycle = lifecycle
        self._registry = registry
        self._canaries = canaries
        self._golden = golden
        self._tries = tries
        self._policies = policies
        self._events = events
        self._heard: Inbox[CanaryVerdict] = Inbox()
        # The latest action of each adapter that is not done yet.
        self._actions: dict[str, _Action] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def hear(self, verdict: CanaryVerdict) -> None:
        """Have `run` act on a verdict."""
        self._heard.put(verdict)

    async def run(self) -> None:
        """Until cancelled. A verdict that waits for its golden set, or for a database that hangs, holds up no other."""
        latest: dict[str, CanaryVerdict] = {}

        async def act_on(verdict: CanaryVerdict) -> None:
            admitted = await self._golden.admitted(verdict)
            if latest.get(verdict.adapter) is verdict:
                del latest[verdict.adapter]
                if admitted:
                    self.act_on(admitted)

        async with asyncio.TaskGroup() as acting:
            while True:
                verdict = await self._heard.take()
                latest[verdict.adapter] = verdict
                acting.create_task(act_on(verdict))

    def act_on(self, verdict: CanaryVerdict) -> None:
        """Do what the policy says about a verdict, until it is done; a later one on the same adapter replaces it."""
        log.warning("%s@v%d is %s: %s", verdict.adapter, verdict.canary, verdict.verdict.value, verdict.reason)
        action = self._actions[verdict.adapter] = _Action(verdict)
        task = asyncio.create_task(self._act_until_done(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is not done; the canary monitor reports those verdicts again after the restart."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def collect(self) -> Iterator[Metric]:
        pending = GaugeMetricFamily(
            "loradock_canary_verdicts_pending",
            "Verdicts on canaries that could not be acted on yet when it is scraped; each is tried again.",
            labels=("verdict",),
        )
        failed = [action.verdict.verdict for action in list(self._actions.values()) if action.attempts > 0]
        for verdict in (Verdict.WORSE, Verdict.PROVED):
            pending.add_metric((verdict.value,), failed.count(verdict))
        yield pending

    async def _act_until_done(self, action: _Action) -> None:
        verdict, pause = action.verdict, RETRY_SECONDS
        while not await self._attempt(action):
            log.warning("%s@v%d: trying again in %.0f s", verdict.adapter, verdict.canary, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)
            if self._actions.get(verdict.adapter) is not action:
                return
            if self._overruled(verdict):
                log.warning("%s@v%d: somebody has decided otherwise meanwhile", verdict.adapter, verdict.canary)
                break
        if self._actions.get(verdict.adapter) is action:
            del self._actions[verdict.adapter]

    async def _attempt(self, action: _Action) -> bool:
        """Whether nothing is left to do."""
        try:
            done = await self._act(action.verdict, first=action.attempts == 0)
        except Exception:  # whatever it is, a bad canary must not keep its traffic because of it
            log.exception("%s@v%d: the verdict was not acted on", action.verdict.adapter, action.verdict.canary)
            done = False
        action.attempts += not done
        return done

    async def _act(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        hearing = asyncio.to_thread(self._tries.heard, verdict)
        worse = verdict.verdict is Verdict.WORSE
        try:
            # A version that does harm does not stay for a database that is slow.
            if await (asyncio.wait_for(hearing, HISTORY_SECONDS) if worse else hearing):
                return True
        except (LoradockError, TimeoutError) as error:
            if not worse:
                raise
            why = str(error) or "the registry does not answer"
            log.warning("%s@v%d: its loop does not hear of it: %s", verdict.adapter, verdict.canary, why)
        done = await self._follow(verdict, first=first)
        if first and not verdict.repeated:
            self._events.publish(CanaryJudged(verdict))
        return done

    async def _follow(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        """What the policy says about a verdict; whether nothing is left to do."""
        policy = self._policies[verdict.adapter]
        if verdict.verdict is Verdict.WORSE and policy.worse == ROLLBACK:
            return await self._roll_back(verdict, first=first)
        if verdict.verdict is Verdict.PROVED and policy.proved == PROMOTE:
            return await self._promote(verdict, first=first)
        if not verdict.repeated:
            self._events.publish(VerdictActedOn(verdict, f"canary_{verdict.verdict.value}", 200))
        return True

    async def _roll_back(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        result = await self._rollback.rollback(
            verdict.adapter, verdict.canary, verdict.reason, verdict.evidence, tell_failure=first
        )
        if result.outcome is Outcome.FAILED:
            return False
        # If somebody makes it a canary again, it is compared from the beginning.
        await asyncio.to_thread(self._canaries.end, verdict.adapter, verdict.canary)
        return True

    async def _promote(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        adapter, status = verdict.adapter, 200
        why = f"proved: {json.dumps(verdict.evidence)}"[:MAX_EVIDENCE]
        try:
            await self._lifecycle.promote(adapter, verdict.canary, by=WHO, expected=verdict.live, why=why)
        except LoradockError as error:
            log.warning("%s@v%d was not promoted: %s", adapter, verdict.canary, error.message)
            status = error.status
        done = status < 500
        if done or first:
            self._events.publish(VerdictActedOn(verdict, "promote", status))
        return done

    def _overruled(self, verdict: CanaryVerdict) -> bool:
        """The version is no canary of that live version any more."""
        if verdict.adapter not in self._registry:
            return True
        canary, live = self._registry.canary(verdict.adapter), self._registry.live(verdict.adapter)
        versions = (live.version if live else None, canary.adapter.version if canary else None)
        return versions != (verdict.live, verdict.canary)

    def note_alarm(self, alarm: DriftAlarm) -> None:
        """Write into the history that something has drifted; nothing else follows. Blocks."""
        adapter, version = alarm.adapter, alarm.version
        log.warning("%s@%s: %s has drifted: %s %s", adapter, version, alarm.signal, alarm.text, alarm.rounded)
        try:
            if adapter in self._registry:  # else it is a base model, which has no history
                why = f"{alarm.signal}: {alarm.evidence}"
                self._registry.note(adapter, "drift", int(version.removeprefix("v")), by=WATCHER, why=why)
        except LoradockError as error:
            log.warning("%s: the drift alarm is missing from the history: %s", adapter, error.message)
