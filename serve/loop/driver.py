"""Drives one loop by a step: waiting > gathering > training > gate > canary > asking, and to the end of its try.

A step does what can be done now and returns; where it waits, `state.look` says until when and `state.note` for what.
Nothing live changes before `_promote`. Whatever fails before that ends the try in a sentence, or is tried again where
it says nothing about the candidate (an engine that starts, a full disk, a tenant's quota).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from serve.adapters.adapter import Adapter
from serve.errors import BadRequest, Conflict, EngineUnavailable, LoradockError, NotFound, OutOfSpace, QuotaExceeded
from serve.loop.candidates import Candidates
from serve.loop.causes import Cause, Causes
from serve.loop.chain import promotes, spend
from serve.loop.examples import Short
from serve.loop.gatekeeper import Gatekeeper, Interrupted
from serve.loop.journal import WHO, Journal
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Loop, Outcome, Phase
from serve.names import short_name, tenant_of
from serve.rollout.admit import VersionAdmission
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.loop_policy import ASK, LoopPolicy
from serve.sequential.sequential_test import Verdict

log = logging.getLogger(__name__)

# What is waited for is looked at again after so long: a job, a golden set, a canary; and more examples.
LOOK_SECONDS = 5.0
GATHER_SECONDS = 300.0
RETRY_SECONDS = 60.0
# A try that has not enough examples by then is none, and nobody's yes is a no.
GATHER_MOST, ASK_MOST = 30 * 86_400.0, 30 * 86_400.0
# The wait after a try that came to nothing doubles so often at most.
DOUBLINGS = 6
RUN = "run"
APPROVE = "approve"
REJECT = "reject"


@dataclass(slots=True)
class Work:
    """A loop that this server drives. `stop`: it was stopped, rejected, or is another server's."""

    loop: Loop
    stop: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class LoopDriver:
    """`clock` is the time of day."""

    def __init__(
        self,
        rows: LoopRows,
        lifecycle: Lifecycle,
        admission: VersionAdmission,
        candidates: Candidates,
        gatekeeper: Gatekeeper,
        causes: Causes,
        journal: Journal,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._registry = lifecycle.registry
        self._lifecycle = lifecycle
        self._admission = admission
        self._policies = admission.policies
        self._candidates = candidates
        self.gatekeeper = gatekeeper
        self.causes = causes
        self._journal = journal
        self._clock = clock
        self._steps: Mapping[Phase, Callable[[Work, LoopPolicy], Awaitable[None]]] = {
            Phase.WAITING: self._wait,
            Phase.GATHERING: self._gather,
            Phase.TRAINING: self._train,
            Phase.GATE: self._judge,
            Phase.CANARY: self._canary,
            Phase.ASKING: self._ask,
        }

    # What is to be done

    def due(self, loops: Sequence[Loop], stopped: bool) -> list[Loop]:
        """Those that this server should take a step of now. Blocks."""
        if loops:
            self.causes.look_if_new(self._clock())
        return [loop for loop in loops if self._is_due(loop, stopped or loop.stopped is not None)]

    def _is_due(self, loop: Loop, stopped: bool) -> bool:
        now = self._clock()
        if loop.wish is not None:
            return True
        if loop.phase is not Phase.WAITING:
            return stopped or now >= loop.state.look
        live = self._registry.live(loop.name)
        if stopped or live is None or now < max(loop.state.not_before, loop.state.look):
            return False
        return self.causes.find(live, self._policies[loop.name].loop, loop.state.tried, now) is not None

    async def run(self, work: Work) -> None:
        """One step."""
        loop, policy = work.loop, self._policies[work.loop.name].loop
        try:
            # What was asked through another server may be about a change that this one has not read yet.
            await asyncio.to_thread(self._registry.refresh)
            if who := await asyncio.to_thread(self._stopped, loop):
                await self._granted(loop)
                if loop.phase is not Phase.WAITING:
                    await self._reject(loop, f"stopped by {who}", by=who)
                return
            if loop.wish and loop.wish["what"] == REJECT:
                if loop.phase is not Phase.WAITING:
                    await self._reject(loop, loop.wish["why"] or "a person said no", by=loop.wish["by"])
                await self._granted(loop)  # then only: a no stands until the try has ended
                return
            if loop.phase is not Phase.WAITING and await self._overtaken(loop):
                return
            await self._steps[loop.phase](work, policy)
        except Interrupted:
            return
        except (EngineUnavailable, OutOfSpace, QuotaExceeded) as error:
            await self._later(loop, f"tried again soon: {error.message}", RETRY_SECONDS)
        except LoradockError as error:
            if loop.phase is Phase.WAITING:
                raise
            if not await self._overtaken(loop):
                await self._end(loop, Outcome.FAILED, error.message)

    def _stopped(self, loop: Loop) -> str | None:
        return loop.stopped or self._rows.stopped()

    async def _overtaken(self, loop: Loop) -> bool:
        """Another version went live meanwhile, or none is: then what was compared is not what answers."""
        live = self._registry.live(loop.name)
        if live is not None and live.version == loop.state.live:
            return False
        if live is not None and live.version == loop.state.candidate:
            await self._promoted(loop, f"v{live.version} is live", {})
        elif live is None:
            await self._end(loop, Outcome.FAILED, "no version of the adapter is live any more")
        else:
            text = f"v{live.version} went live meanwhile, and the try began with v{loop.state.live}"
            await self._reject(loop, text)
        return True

    # Phases

    async def _wait(self, work: Work, policy: LoopPolicy) -> None:
        loop, now = work.loop, self._clock()
        wish = loop.wish if loop.wish and loop.wish["what"] == RUN else None
        await self._granted(loop)
        live = self._registry.live(loop.name)
        if live is None:
            return
        cause = Cause("asked", f"{wish['by']} asked for it") if wish else None
        cause = cause or await asyncio.to_thread(self._found, live, policy, loop.state.tried, now)
        if cause is None:
            return
        alpha = await self._budget(loop, policy)
        if not alpha:
            return
        content = {"cause": cause.described(), "live": live.version}
        begun = await asyncio.to_thread(self._rows.begin, loop, alpha, content, live.version, cause.since)
        if begun is not None:
            await asyncio.to_thread(self._journal.step, begun, "opened", f"{cause.kind}: {cause.text}", content)

    def _found(self, live: Adapter, policy: LoopPolicy, tried: float | None, now: float) -> Cause | None:
        """What opens a try, as of now: an alarm may have been acknowledged since the last look."""
        self.causes.look()
        return self.causes.find(live, policy, tried, now)

    async def _budget(self, loop: Loop, policy: LoopPolicy) -> float:
        """What the next try may spend; 0 when this month has nothing left."""
        month = month_of(self._clock())
        count, spent = await asyncio.to_thread(self._rows.spent, loop, month)
        alpha = spend(policy.gate.alpha, policy.budget, spent)
        if count >= policy.budget or not alpha:
            note = f"the {policy.budget} tries of this month are used: the next one may begin next month"
            await self._later(loop, note, 3600.0)
            return 0.0
        return alpha

    async def _gather(self, work: Work, policy: LoopPolicy) -> None:
        loop, now = work.loop, self._clock()
        await self._granted(loop)
        live = self._registry.get(loop.name, loop.state.live)
        try:
            prepared = await self._candidates.prepare(loop, live, policy, now)
        except Short as short:
            if now - loop.state.since > GATHER_MOST:
                text = f"{short.message}, and it has waited for 30 days"
                if await asyncio.to_thread(self._rows.end, loop, None, {}, note=text):
                    await asyncio.to_thread(self._journal.step, loop, "given_up", text)
                return
            await self._later(loop, short.message, GATHER_SECONDS)
            return
        more = {"job": prepared.job, "held_out": prepared.held_out, "gathered_until": now, "note": "", "look": 0.0}
        content = {"job": prepared.job, "data": prepared.evidence}
        training = await asyncio.to_thread(self._rows.enter, loop, Phase.TRAINING, content, **more)
        if training is not None:
            await asyncio.to_thread(self._journal.step, training, "training", prepared.text, prepared.evidence)

    async def _train(self, work: Work, policy: LoopPolicy) -> None:
        loop = work.loop
        await self._granted(loop)
        trained = await self._candidates.trained(loop)
        if trained is None:
            await self._later(loop, f"{loop.state.job} trains", LOOK_SECONDS)
            return
        content = {"candidate": trained}
        await asyncio.to_thread(self._rows.enter, loop, Phase.GATE, content, candidate=trained, note="", look=0.0)

    async def _judge(self, work: Work, policy: LoopPolicy) -> None:
        loop = work.loop
        await self._granted(loop)
        live, candidate = self._versions(loop)
        gate = await self.gatekeeper.judge(loop, live, candidate, policy.gate, lambda: not work.stop)
        if gate is None:
            await self._later(loop, "the golden set is being asked", LOOK_SECONDS)
            return
        evidence = gate.described()
        content: dict[str, Any] = {"gate": evidence, "score": next((part.candidate for part in gate.parts), None)}
        replays = self.gatekeeper.replays
        if gate.passed and (told := await replays.compared(loop, live, candidate, lambda: not work.stop)):
            content["replay"] = told
        if work.stop:
            raise Interrupted
        await asyncio.to_thread(self._rows.add, loop, **content)
        await asyncio.to_thread(self._journal.step, loop, "gate", gate.sentence, evidence)
        if told := content.get("replay"):
            await asyncio.to_thread(self._journal.step, loop, "replay", told["text"], told)
        if gate.forgotten:
            self._journal.metrics.forgot(loop.name)
            text = "; ".join(part.sentence for part in gate.forgotten)
            await asyncio.to_thread(self._journal.step, loop, "forgetting", text, evidence)
        if not promotes(gate.passed, None):
            await self._reject(loop, gate.sentence, evidence)
        elif policy.canary:
            await asyncio.to_thread(self._rows.enter, loop, Phase.CANARY, note="", look=0.0)
        else:
            await self._agreed(loop, policy, gate.sentence)

    async def _canary(self, work: Work, policy: LoopPolicy) -> None:
        loop, now = work.loop, self._clock()
        await self._granted(loop)
        live, candidate = self._versions(loop)
        verdict, why = await asyncio.to_thread(self._verdict, loop)
        share = self._registry.canary(loop.name)
        if share is not None and share.adapter.version != candidate.version:
            note = f"v{share.adapter.version} is the canary: this one waits for its end"
            await self._later(loop, note, RETRY_SECONDS)
        elif verdict is Verdict.WORSE:
            await self._reject(loop, f"its canary did worse: {why}")
        elif verdict is not None and promotes(True, verdict):
            await self._agreed(loop, policy, "its canary proved to be no worse")
        elif share is not None and now - loop.state.since > policy.canary_for:
            await self._reject(loop, f"its canary did not prove itself within {policy.canary_for / 86_400:g} days")
        elif share is not None:
            await self._later(loop, "its canary answers a share of the traffic", LOOK_SECONDS)
        elif loop.state.has_share or await asyncio.to_thread(self._had_share, loop):
            await self._reject(loop, f"its canary was ended: {await asyncio.to_thread(self._last_change, loop.name)}")
        else:
            await self._begin_canary(loop, live, candidate, policy.canary)

    async def _begin_canary(self, loop: Loop, live: Adapter, candidate: Adapter, weight: float) -> None:
        share, why = (loop.name, "canary", candidate.version, weight), f"try {loop.state.number} of its loop"
        await self._lifecycle.share(*share, by=WHO, why=why, expected=live.version)
        note = f"v{candidate.version} gets {weight:g} of the traffic"
        await self._later(loop, note, LOOK_SECONDS, has_share=True)
        await asyncio.to_thread(self._journal.step, loop, "canary", note)

    async def _ask(self, work: Work, policy: LoopPolicy) -> None:
        loop = work.loop
        verdict, why = await asyncio.to_thread(self._verdict, loop)
        if loop.wish and loop.wish["what"] == APPROVE and verdict is not Verdict.WORSE:
            await self._promote(loop, f"{loop.wish['by']} said yes", by=loop.wish["by"])
            await self._granted(loop)
            return
        await self._granted(loop)
        if verdict is Verdict.WORSE:
            await self._reject(loop, f"its canary did worse while it waited for a yes: {why}")
        elif self._clock() - loop.state.since > ASK_MOST:
            await self._reject(loop, "nobody said yes for 30 days")
        else:
            name = short_name(loop.name, tenant_of(loop.name))
            note = f"v{loop.state.candidate} waits for a yes: loradock loop approve {name}"
            await self._later(loop, note, RETRY_SECONDS)

    # The end of a try

    async def _agreed(self, loop: Loop, policy: LoopPolicy, text: str) -> None:
        """All evidence is there."""
        if policy.promote == ASK:
            asking = await asyncio.to_thread(self._rows.enter, loop, Phase.ASKING, note="", look=0.0)
            if asking is not None:
                await asyncio.to_thread(self._journal.step, asking, "asks", f"{text}: it waits for a person's yes")
            return
        await self._promote(loop, text)

    async def _promote(self, loop: Loop, text: str, by: str = WHO) -> None:
        live, candidate = self._versions(loop)
        policy = self._policies[loop.name].proven
        try:
            await self._admission.check(candidate, policy)
        except Conflict as held:
            await self._reject(loop, held.message)
            return
        if not await asyncio.to_thread(self._rows.is_mine, loop):
            raise Interrupted  # it was stopped, rejected or taken over while this step went on
        why = f"try {loop.state.number} of its loop: {text}"
        await self._admission.admit(candidate, policy, by, why=why, expected=live.version)
        await self._promoted(loop, text, {}, by=by)

    async def _promoted(self, loop: Loop, text: str, evidence: Mapping[str, Any], by: str = WHO) -> None:
        """The candidate is live: what it was proved on is a reference from now on, and what moved moves no more."""
        rows, candidate = self._rows, self._registry.get(loop.name, loop.state.candidate)
        await asyncio.to_thread(self.causes.answered, candidate)
        if loop.state.held_out:
            label = f"v{loop.state.candidate}"
            await asyncio.to_thread(rows.references.keep, loop, loop.state.held_out, label, self._score(loop))
        state = {"failures": 0, "not_before": 0.0, "trained_until": loop.state.gathered_until, "note": text}
        if await asyncio.to_thread(rows.end, loop, Outcome.PROMOTED, {"text": text, "by": by}, **state):
            await asyncio.to_thread(self._journal.ended, loop, Outcome.PROMOTED, text, evidence, by)

    async def _reject(self, loop: Loop, text: str, evidence: Mapping[str, Any] | None = None, *, by: str = WHO) -> None:
        await self._end(loop, Outcome.REJECTED, text, evidence, by=by)

    async def _end(
        self,
        loop: Loop,
        outcome: Outcome,
        text: str,
        evidence: Mapping[str, Any] | None = None,
        *,
        by: str = WHO,
    ) -> None:
        """The candidate does not become live; what it had of traffic and machine is given back."""
        await asyncio.to_thread(self._candidates.give_up, loop)
        await self._end_canary(loop, text)
        failures = loop.state.failures + 1
        wait = self._policies[loop.name].loop.wait * 2 ** min(failures - 1, DOUBLINGS)
        state = {"failures": failures, "not_before": self._clock() + wait, "note": text}
        if await asyncio.to_thread(self._rows.end, loop, outcome, {"text": text, "by": by}, **state):
            await asyncio.to_thread(self._journal.ended, loop, outcome, text, evidence or {}, by)

    async def _end_canary(self, loop: Loop, why: str) -> None:
        share = self._registry.canary(loop.name) if loop.name in self._registry else None
        if loop.state.candidate and share is not None and share.adapter.version == loop.state.candidate:
            try:
                await self._lifecycle.share(loop.name, "canary", loop.state.candidate, 0, by=WHO, why=why)
            except NotFound:
                return

    # Helpers

    def _versions(self, loop: Loop) -> tuple[Adapter, Adapter]:
        try:
            live = self._registry.get(loop.name, loop.state.live)
            return live, self._registry.get(loop.name, loop.state.candidate)
        except NotFound as gone:
            raise BadRequest(f"a version that is compared was removed meanwhile: {gone.message}") from gone

    def _verdict(self, loop: Loop) -> tuple[Verdict | None, str]:
        """What the canary of this try came to, and why."""
        tries = self._rows.tries(loop, 1)
        canary = tries[0].content.get("canary") if tries else None
        return (Verdict(canary["verdict"]), canary["reason"]) if canary else (None, "")

    def _score(self, loop: Loop) -> float | None:
        tries = self._rows.tries(loop, 1)
        return tries[0].content.get("score") if tries else None

    def _had_share(self, loop: Loop) -> bool:
        """Whether its candidate was a canary, whoever made it one: also where that is not in the loop's state, since a
        person did, or the server that did died before it wrote it down."""
        changes = self._registry.history(loop.name)
        return any(change["what"] == "canary" and change["to_version"] == loop.state.candidate for change in changes)

    def _last_change(self, name: str) -> str:
        for change in reversed(self._registry.history(name)):
            if change["what"] in ("canary_end", "rollback"):
                return f"{change['who']}: {change['why'] or change['what']}"
        return "see its history"

    async def _granted(self, loop: Loop) -> None:
        if loop.wish is not None:
            await asyncio.to_thread(self._rows.grant, loop)

    async def _later(self, loop: Loop, note: str, seconds: float, **state: Any) -> None:
        await asyncio.to_thread(self._rows.enter, loop, note=note, look=self._clock() + seconds, **state)


def month_of(now: float) -> float:
    """When the calendar month of this moment began, by UTC."""
    day = datetime.fromtimestamp(now, UTC)
    return datetime(day.year, day.month, 1, tzinfo=UTC).timestamp()
