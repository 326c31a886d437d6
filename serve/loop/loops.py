"""Loops as a whole: shown, asked and stopped here; driven by `LoopSchedule`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from serve.adapters.registry.registry import Registry
from serve.auth.audit import Audit
from serve.dataset.conversations import Captured
from serve.errors import Conflict, NotFound
from serve.loop.candidates import Candidates
from serve.loop.causes import Causes, Ratings
from serve.loop.driver import APPROVE, REJECT, RUN, LoopDriver, month_of
from serve.loop.gatekeeper import Gatekeeper, Scorer
from serve.loop.journal import Journal
from serve.loop.likelihood import Example
from serve.loop.loop_rows import LoopRows
from serve.loop.metrics import LoopMetrics
from serve.loop.objects import Loop, Phase
from serve.loop.replays import Replays
from serve.loop.schedule import LoopSchedule
from serve.names import shown, tenant_of
from serve.rollout.canary.canary import CanaryVerdict
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.loop_policy import LoopPolicy
from serve.sequential.sequential_test import Verdict


class Loops:
    """`policy(name)` is the adapter's, and `captured(name)` what it was asked here; `alone` says that no other server
    shares the registry, `servers()` how many do. Files of examples are kept for `file_seconds`. The rest is as the
    parts take it."""

    def __init__(
        self,
        rows: LoopRows,
        registry: Registry,
        lifecycle: Lifecycle,
        golden: Golden,
        candidates: Candidates,
        scorer: Scorer,
        captured: Callable[[str], Iterator[Captured]],
        audit: Audit,
        *,
        policy: Callable[[str], LoopPolicy],
        alone: bool,
        drifted: Callable[[], Mapping[str, Sequence[Mapping[str, Any]]]],
        anew: Callable[[str, str, str], None],
        notify: Callable[[str, Mapping[str, Any]], None],
        swapped: Callable[[str, str], None] = lambda name, result: None,
        labelled: Callable[[str], bool] = lambda adapter: True,
        servers: Callable[[], int] = lambda: 1,
        file_seconds: float = 30 * 86_400.0,
        ratings: Ratings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rows = rows
        self._policy = policy
        self._servers = servers
        self._clock = clock
        self._file_seconds = file_seconds
        self.ratings, self.metrics = ratings or Ratings(), LoopMetrics(labelled)
        self.candidates, self.gatekeeper = candidates, Gatekeeper(rows, scorer, golden)
        driver = LoopDriver(
            rows,
            registry,
            lifecycle,
            candidates,
            self.gatekeeper,
            Replays(rows, captured, golden),
            golden.verdicts,
            Causes(drifted, registry.history, self.ratings),
            Journal(registry, audit, self.metrics, notify),
            policy=policy,
            anew=anew,
            swapped=swapped,
            clock=clock,
        )
        self.schedule = LoopSchedule(rows, registry, driver, self.metrics, policy, alone=alone, clock=clock)

    # A canary of a loop

    def alpha(self, name: str) -> float:
        """What a false verdict on the adapter's canary may cost, if it is its loop's; else 1. Blocks.

        Each server has an analysis of its own traffic, and any of them may prove: they share what the try may spend.
        """
        loop = self.rows.get(name)
        if loop is None or loop.phase is Phase.WAITING:
            return 1.0
        # In every phase: a person may have given the candidate its share before its loop does.
        return loop.state.alpha / max(1, self._servers())

    def is_candidate(self, name: str, version: int) -> bool:
        """The try that goes on has trained this version, on answers that the live one does not give. Blocks."""
        loop = self.rows.get(name)
        return loop is not None and loop.phase is not Phase.WAITING and loop.state.candidate == version

    def heard(self, verdict: CanaryVerdict) -> bool:
        """Note the verdict on a canary; whether the loop acts on it, and nobody else. Blocks."""
        loop = self.rows.get(verdict.adapter)
        if loop is None or loop.phase not in (Phase.CANARY, Phase.ASKING) or loop.state.candidate != verdict.canary:
            return False
        said = {"verdict": verdict.verdict.value, "reason": verdict.reason, "evidence": verdict.evidence}
        self.rows.hear(loop, said)
        if loop.phase is Phase.CANARY or verdict.verdict is Verdict.WORSE:
            self.rows.look(loop)
        return verdict.verdict is Verdict.PROVED

    # For people. All of it blocks

    def listed(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Where the loops of these adapters are, without policies, tries and references; by name."""
        everywhere = self.rows.stopped()
        found = sorted((loop for loop in self.rows.all() if loop.name in names), key=lambda loop: loop.name)
        return [{"name": loop.name, **self._summary(loop.name, loop, everywhere)} for loop in found]

    def described(self, name: str) -> dict[str, Any]:
        """A loop with its policy, tries and references."""
        policy, loop = self._policy(name), self.rows.get(name)
        answer = {
            **self._summary(name, loop, self.rows.stopped()),
            "policy": {**asdict(policy), "on": list(policy.on)},
        }
        if loop is None:
            return {**answer, "tries": [], "references": []}
        return {
            **answer,
            "tries": [one.described() for one in self.rows.tries(loop)],
            "references": [one.described() for one in self.rows.references(loop)],
        }

    def _summary(self, name: str, loop: Loop | None, everywhere: str | None) -> dict[str, Any]:
        policy = self._policy(name)
        answer: dict[str, Any] = {"on": list(policy.on), "stopped_everywhere": everywhere}
        if loop is None:
            return {**answer, "phase": None, "stopped": None, "note": ""}
        state = loop.state
        count, spent = self.rows.spent(loop, month_of(self._clock()))
        return {
            **answer,
            "phase": loop.phase.value,
            "since": state.since,
            "note": state.note,
            "stopped": loop.stopped,
            "asked": loop.wish,
            "failures": state.failures,
            "not_before": state.not_before or None,
            "month": {"tries": count, "budget": policy.budget, "spent": round(spent, 6), "alpha": policy.gate.alpha},
        }

    def run(self, name: str, by: str) -> None:
        """Open a try now, whatever it waits for; the month's budget stays."""
        loop = self.rows.made(name)
        if who := loop.stopped or self.rows.stopped():
            raise Conflict(f"the loop of {shown(name)} was stopped by {who}: start it first (`loradock loop start`)")
        if loop.phase is not Phase.WAITING:
            raise Conflict(f"the loop of {shown(name)} is in try {loop.state.number} already: {loop.phase.value}")
        self._wish(loop, RUN, by)

    def approve(self, name: str, by: str) -> None:
        """A person says yes to the candidate; a no that somebody said before stands."""
        loop = self._there(name)
        if loop.phase is not Phase.ASKING:
            raise Conflict(f"the loop of {shown(name)} asks nothing now: it is {loop.phase.value}")
        if no := self.rows.wish(loop, APPROVE, by, unless=REJECT):
            raise Conflict(f"{no['by']} said no to the candidate of {shown(name)} already: the try ends")
        self.schedule.wake(loop.id)

    def reject(self, name: str, by: str, why: str) -> None:
        """A person says no: the try ends here."""
        loop = self._there(name)
        if loop.phase is Phase.WAITING:
            raise Conflict(f"the loop of {shown(name)} is in no try: there is nothing to reject")
        self._wish(loop, REJECT, by, why)

    def stop(self, name: str | None, by: str) -> None:
        """End the try that goes on, and begin none until it is started; without a name, of every adapter."""
        self.rows.stop(None if name is None else self.rows.made(name), by)
        self.schedule.wake()

    def start(self, name: str | None) -> None:
        """The loop may go on."""
        self.rows.stop(None if name is None else self.rows.made(name), None)
        self.schedule.wake()

    def drop(self, name: str, reference: str) -> None:
        """Forget a reference with its examples: later candidates may lose what it holds."""
        if not self.rows.drop(self._there(name), reference):
            raise NotFound(f"the loop of {shown(name)} has no reference {shown(reference)}", param="reference")

    def forget_conversation(self, tenant: str, id: str, lines: Sequence[Mapping[str, Any]] = ()) -> int:
        """A captured conversation was deleted, which may have gone on with several adapters of its tenant's: no
        reference holds its examples any more, nor one of these `lines` of a training file, and no later try takes these
        out of an earlier file; how many there were."""
        digests = {Example(line).digest for line in lines}
        self.rows.note_deleted(tenant, digests, self._clock() + self._file_seconds)
        self.candidates.deletions.add(tenant, id, digests)
        mine = [loop for loop in self.rows.all() if tenant_of(loop.name) == tenant]
        return sum(self.rows.forget_conversation(loop, id, digests) for loop in mine)

    def _there(self, name: str) -> Loop:
        loop = self.rows.get(name)
        if loop is None:
            raise NotFound(f"{shown(name)} has no loop: give it a policy with `loop` (docs/loop.md)", param="name")
        return loop

    def _wish(self, loop: Loop, what: str, by: str, why: str = "") -> None:
        self.rows.wish(loop, what, by, why)
        self.schedule.wake(loop.id)
