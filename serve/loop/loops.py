"""Loops as a whole: shown, asked and stopped here; driven by `LoopSchedule`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from serve.errors import Conflict, NotFound
from serve.events import DriftAlarm, Event, GoldenScored, JobEnded
from serve.loop.candidates import Candidates
from serve.loop.causes import Ratings
from serve.loop.driver import APPROVE, REJECT, RUN, LoopDriver, month_of
from serve.loop.likelihood import Example
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Loop, Phase
from serve.loop.schedule import LoopSchedule
from serve.names import shown, tenant_of
from serve.rollout.policy import Policies


class Loops:
    """`ratings` are counted here. Files of examples are kept for `file_seconds`; `clock` is the time of day."""

    def __init__(
        self,
        rows: LoopRows,
        policies: Policies,
        candidates: Candidates,
        driver: LoopDriver,
        schedule: LoopSchedule,
        ratings: Ratings,
        *,
        file_seconds: float = 30 * 86_400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rows = rows
        self.candidates = candidates
        self.driver = driver
        self.schedule = schedule
        self.ratings = ratings
        self._policies = policies
        self._file_seconds = file_seconds
        self._clock = clock

    def hear(self, event: Event) -> None:
        """Have the loops look now that may wait for this. Blocks; for any thread."""
        if isinstance(event, DriftAlarm):
            self.driver.causes.note_alarm()
        for loop in self.rows.all():
            if _waits_for(loop, event):
                self.rows.look(loop)
        self.schedule.look_now()

    # For people. All of it blocks

    def listed(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Where the loops of these adapters are, without policies, tries and references; by name."""
        everywhere = self.rows.stopped()
        found = sorted((loop for loop in self.rows.all() if loop.name in names), key=lambda loop: loop.name)
        return [{"name": loop.name, **self._summary(loop.name, loop, everywhere)} for loop in found]

    def described(self, name: str) -> dict[str, Any]:
        """A loop with its policy, tries and references."""
        policy, loop = self._policies[name].loop, self.rows.get(name)
        answer = {
            **self._summary(name, loop, self.rows.stopped()),
            "policy": {**asdict(policy), "on": list(policy.on)},
        }
        if loop is None:
            return {**answer, "tries": [], "references": []}
        return {
            **answer,
            "tries": [one.described() for one in self.rows.tries(loop)],
            "references": [one.described() for one in self.rows.references.kept(loop)],
        }

    def _summary(self, name: str, loop: Loop | None, everywhere: str | None) -> dict[str, Any]:
        policy = self._policies[name].loop
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
        if not self.rows.references.drop(self._there(name), reference):
            raise NotFound(f"the loop of {shown(name)} has no reference {shown(reference)}", param="reference")

    def forget_conversation(self, tenant: str, id: str, lines: Sequence[Mapping[str, Any]] = ()) -> int:
        """A captured conversation was deleted, which may have gone on with several adapters of its tenant's: no
        reference holds its examples any more, nor one of these `lines` of a training file, and no later try takes these
        out of an earlier file; how many there were."""
        digests = {Example(line).digest for line in lines}
        self.rows.references.note_deleted(tenant, digests, self._clock() + self._file_seconds)
        self.candidates.deletions.add(tenant, id, digests)
        mine = [loop for loop in self.rows.all() if tenant_of(loop.name) == tenant]
        return sum(self.rows.references.forget_conversation(loop, id, digests) for loop in mine)

    def _there(self, name: str) -> Loop:
        loop = self.rows.get(name)
        if loop is None:
            raise NotFound(f"{shown(name)} has no loop: give it a policy with `loop` (docs/loop.md)", param="name")
        return loop

    def _wish(self, loop: Loop, what: str, by: str, why: str = "") -> None:
        self.rows.wish(loop, what, by, why)
        self.schedule.wake(loop.id)


def _waits_for(loop: Loop, event: Event) -> bool:
    match event:
        case JobEnded():
            return loop.phase is Phase.TRAINING and loop.state.job == event.job
        case GoldenScored():
            return loop.phase is Phase.GATE and loop.name == event.adapter
    return False
