"""Acts on the verdict on a canary, as the adapter's policy says, and writes down drift alarms.

An action that fails is tried again, with longer and longer pauses, until it is done or somebody has overruled it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.registry.registry import Registry
from serve.auth.audit import Audit
from serve.drift.watched_version import Alarm
from serve.errors import Conflict, LoradockError
from serve.names import tenant_of
from serve.rollout.canary.canary import CanaryVerdict
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import HOLD, PROMOTE, ROLLBACK, Policy, policy_for
from serve.rollout.rollback import HISTORY_SECONDS, AutomaticRollback, Outcome
from serve.sequential.sequential_test import Verdict

log = logging.getLogger(__name__)

# Who acted, in histories and the audit log: on a verdict, and on a drift alarm.
WHO, WATCHER = "referee", "watcher"
MAX_EVIDENCE = 2048
# The pause before the second attempt; each further one is twice as long.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0


@dataclass(slots=True, eq=False)
class _Action:
    """What is done about one verdict."""

    verdict: CanaryVerdict
    # Those that failed.
    attempts: int = 0


class RolloutController(Collector):
    """`act_on` and `close` belong to the event loop. `swapped(adapter, result)` counts a promotion.

    `notify(type, data)` hears of verdicts and alarms, `heard(verdict)` tells whether a loop acts on it; in a thread.
    """

    def __init__(
        self,
        rollback: AutomaticRollback,
        lifecycle: Lifecycle,
        registry: Registry,
        audit: Audit,
        canaries: CanaryMonitor,
        policies: Sequence[Policy],
        swapped: Callable[[str, str], None] = lambda adapter, result: None,
        notify: Callable[[str, Mapping[str, Any]], None] = lambda type, data: None,
        heard: Callable[[CanaryVerdict], bool] = lambda verdict: False,
    ) -> None:
        self._rollback = rollback
        self._lifecycle = lifecycle
        self._registry = registry
        self._audit = audit
        self._canaries = canaries
        self._policies = policies
        self._swapped = swapped
        self._notify, self._heard = notify, heard
        # The latest action of each adapter that is not done yet.
        self._actions: dict[str, _Action] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def policy(self, adapter: str) -> Policy:
        """The policy of the adapter of this full name."""
        return policy_for(self._policies, adapter)

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
        hearing = asyncio.to_thread(self._heard, verdict)
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
            await asyncio.to_thread(self._notify, f"canary.{verdict.verdict.value}", _as_data(verdict))
        return done

    async def _follow(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        """What the policy says about a verdict; whether nothing is left to do."""
        policy = self.policy(verdict.adapter)
        if verdict.verdict is Verdict.WORSE and policy.worse == ROLLBACK:
            return await self._roll_back(verdict, first=first)
        if verdict.verdict is Verdict.PROVED and policy.proved == PROMOTE:
            return await self._promote(verdict, first=first)
        if not verdict.repeated:
            await self._write(verdict, 200, f"canary_{verdict.verdict.value}")
        return True

    async def _roll_back(self, verdict: CanaryVerdict, *, first: bool) -> bool:
        result = await self._rollback.rollback(
            verdict.adapter, verdict.canary, verdict.reason, verdict.evidence, audit_failure=first
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
            self._swapped(adapter, "promoted")
        except LoradockError as error:
            log.warning("%s@v%d was not promoted: %s", adapter, verdict.canary, error.message)
            status = error.status
        done = status < 500
        if done or first:
            await self._write(verdict, status, "promote")
        return done

    def _overruled(self, verdict: CanaryVerdict) -> bool:
        """The version is no canary of that live version any more."""
        if verdict.adapter not in self._registry:
            return True
        canary, live = self._registry.canary(verdict.adapter), self._registry.live(verdict.adapter)
        versions = (live.version if live else None, canary.adapter.version if canary else None)
        return versions != (verdict.live, verdict.canary)

    async def _write(self, verdict: CanaryVerdict, status: int, what: str) -> None:
        await asyncio.to_thread(
            self._audit.write,
            status=status,
            who=WHO,
            tenant=tenant_of(verdict.adapter),
            key=None,
            what=what,
            subject=f"{verdict.adapter}@v{verdict.canary}",
            reason=verdict.reason,
            evidence=json.dumps(verdict.evidence)[:MAX_EVIDENCE],
        )

    def alarmed(self, alarm: Alarm) -> None:
        """Write down that something has drifted; nothing else follows. Writes to disk; not for the event loop."""
        adapter, version = alarm.adapter, alarm.version
        effects = {name: round(value, 3) for name, value in alarm.effects.items()}
        text = alarm.moved.get("text", "")
        log.warning("%s@%s: %s has drifted: %s %s", adapter, version, alarm.signal, text, effects)
        evidence = json.dumps({"signal": alarm.signal, **effects, "text": text}, ensure_ascii=False)
        try:
            if adapter in self._registry:  # else it is a base model, which has no history
                why = f"{alarm.signal}: {evidence}"
                self._registry.note(adapter, "drift", int(version.removeprefix("v")), by=WATCHER, why=why)
        except LoradockError as error:
            log.warning("%s: the drift alarm is missing from the history: %s", adapter, error.message)
        self._audit.write(
            status=200,
            who=WATCHER,
            tenant=tenant_of(adapter),
            key=None,
            what="drift",
            subject=f"{adapter}@{version}",
            reason=alarm.signal,
            evidence=evidence,
        )
        data = {
            "adapter": adapter,
            "version": version,
            "tenant": tenant_of(adapter),
            "signal": alarm.signal,
            "text": text,
            "effects": effects,
            "log_evidence": round(alarm.log_evidence, 3) if math.isfinite(alarm.log_evidence) else None,
            "moved": dict(alarm.moved),
        }
        self._notify("drift.alarm", data)

    def check(self, adapter: str, version: int, at_once: bool) -> None:
        """Conflict, if the policy holds this version back."""
        analysis = self._canaries.analysis(adapter)
        if at_once or analysis is None or analysis.canary != version or self.policy(adapter).worse != HOLD:
            return
        if analysis.verdict is Verdict.WORSE:
            raise Conflict(
                f"version {version} did worse than version {analysis.live} as its canary, and this adapter's policy "
                'holds it back: see its /drift, and promote it with "at_once": true if you want it all the same'
            )


def _as_data(verdict: CanaryVerdict) -> dict[str, Any]:
    """A verdict as webhooks have it."""
    return {
        "adapter": verdict.adapter,
        "version": verdict.canary,
        "live": verdict.live,
        "tenant": tenant_of(verdict.adapter),
        "verdict": verdict.verdict.value,
        "text": verdict.reason,
        "evidence": verdict.evidence,
    }
