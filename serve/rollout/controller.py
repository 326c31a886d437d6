"""What follows of a verdict on a canary, by policy, and of an alarm; always told to history, audit log and a metric."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence

from serve.adapters.registry import Registry
from serve.auth.audit import Audit
from serve.drift.watched_version import Alarm
from serve.errors import Conflict, LoradockError
from serve.names import tenant_of
from serve.rollout.canary import CanaryVerdict
from serve.rollout.canary_monitor import CanaryMonitor
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import HOLD, PROMOTE, ROLLBACK, Policy, policy_for
from serve.rollout.rollback import AutomaticRollback
from serve.rollout.sequential_test import Verdict

log = logging.getLogger(__name__)

WHO = "referee"
# Who has seen that something moved.
WATCHER = "watcher"


class RolloutController:
    """`swapped(adapter, result)` hears of a promotion, for the metric."""

    def __init__(
        self,
        rollback: AutomaticRollback,
        lifecycle: Lifecycle,
        registry: Registry,
        audit: Audit,
        canaries: CanaryMonitor,
        policies: Sequence[Policy],
        swapped: Callable[[str, str], None] = lambda adapter, result: None,
    ) -> None:
        self._rollback = rollback
        self._lifecycle = lifecycle
        self._registry = registry
        self._audit = audit
        self._canaries = canaries
        self._policies = policies
        self._swapped = swapped

    def policy(self, adapter: str) -> Policy:
        """The policy of the adapter of this full name."""
        return policy_for(self._policies, adapter)

    async def decide(self, verdict: CanaryVerdict) -> None:
        """Do what the policy says; whatever comes of it is logged."""
        policy, adapter = self.policy(verdict.adapter), verdict.adapter
        log.warning("%s@v%d is %s: %s", adapter, verdict.canary, verdict.verdict.value, verdict.reason)
        if verdict.verdict is Verdict.WORSE and policy.worse == ROLLBACK:
            await self._rollback.rollback(adapter, verdict.canary, verdict.reason, verdict.evidence)
            return
        status, what = 200, f"canary_{verdict.verdict.value}"
        if verdict.verdict is Verdict.PROVED and policy.proved == PROMOTE:
            what = "promote"
            why = f"proved: {json.dumps(verdict.evidence)}"[:2048]
            try:
                await self._lifecycle.promote(adapter, verdict.canary, by=WHO, expected=verdict.live, why=why)
                self._swapped(adapter, "promoted")
            except LoradockError as error:
                log.warning("%s@v%d was not promoted: %s", adapter, verdict.canary, error.message)
                status = error.status
        await asyncio.to_thread(
            self._audit.write,
            status=status,
            who=WHO,
            tenant=tenant_of(adapter),
            key=None,
            what=what,
            subject=f"{adapter}@v{verdict.canary}",
            reason=verdict.reason,
            evidence=json.dumps(verdict.evidence)[:2048],
        )

    def alarmed(self, alarm: Alarm) -> None:
        """Something has drifted: that is told, and nothing follows of it by itself. Writes; not for the event loop."""
        adapter, version = alarm.adapter, alarm.version
        effects = {name: round(value, 3) for name, value in alarm.effects.items()}
        log.warning("%s@%s: %s has drifted: %s", adapter, version, alarm.signal, effects)
        told = json.dumps({"signal": alarm.signal, **effects})
        try:
            if adapter in self._registry:  # else it is a base model, which has no history
                why = f"{alarm.signal}: {told}"
                self._registry.note(adapter, "drift", int(version.removeprefix("v")), by=WATCHER, why=why)
        except LoradockError as error:
            log.warning("%s: the history lacks that it drifted: %s", adapter, error.message)
        self._audit.write(
            status=200,
            who=WATCHER,
            tenant=tenant_of(adapter),
            key=None,
            what="drift",
            subject=f"{adapter}@{version}",
            reason=alarm.signal,
            evidence=told,
        )

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
