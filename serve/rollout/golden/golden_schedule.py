"""Runs golden sets: when a version is new, against a canary, once per interval, and when somebody asks for it.

What is due follows from what the database holds, so that a restart or another server goes on where this one stopped:

    new         cases without an outcome, of a version that was pushed after the set was put, is live or a canary
    scheduled   all cases of the live version and the canary, once their outcomes are older than the interval

One server at a time runs the set of an adapter, and no set keeps the others waiting for longer than `SLICE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from serve.adapters.adapter import Adapter
from serve.auth.rate_limits import Meter
from serve.engine.payer import Cause, Payer
from serve.errors import LoradockError
from serve.events import Events, GoldenScored
from serve.rollout.golden.golden_falls import GoldenFalls
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_runner import AT_ONCE, GoldenRunner
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.golden.golden_store import Outcome
from serve.rollout.golden.golden_verdicts import GoldenVerdicts
from serve.rollout.golden.held_promotions import HeldPromotions

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
# A server that stopped in a run keeps others from the set for so long.
CLAIM_SECONDS = 120.0
SLICE_SECONDS = 30.0
# A case without a score is asked again after this; a set whose engine does not answer is looked at again.
RETRY_SECONDS, PAUSE_SECONDS = 600.0, 30.0
# Outcomes that are due within this part of the interval are due together.
TOGETHER = 0.1
# Versions that are neither live nor a canary, the latest ones.
NEW_VERSIONS = 3


@dataclass(slots=True)
class _Run:
    """Cases of one version that are asked one after another, in one slice or several."""

    reason: str
    began: float
    asked: int = 0


@dataclass(slots=True)
class _Request:
    """Why a version is asked, the cases that are left, and who pays."""

    reason: str
    keys: list[str]
    payer: Payer
    # A case that has a score by then is left out.
    unanswered: bool = False


class GoldenRuns:
    """For one event loop; `interval` in seconds, 0 for none.

    Publishes every run that has ended. What nobody asked for is paid by the adapter's tenant, and charged to the key
    that put the set: `meter_of(key)` has its limits, if it has any.
    """

    def __init__(
        self,
        results: GoldenResults,
        runner: GoldenRunner,
        verdicts: GoldenVerdicts,
        falls: GoldenFalls,
        held: HeldPromotions,
        events: Events,
        *,
        interval: float,
        meter_of: Callable[[str], Meter | None],
    ) -> None:
        self._results = results
        self._store = results.store
        self._registry = results.registry
        self._runner = runner
        self._verdicts = verdicts
        self._falls = falls
        self._held = held
        self._events = events
        self._interval = interval
        self._meter_of = meter_of
        self._clock = self._store.clock
        self._wake = asyncio.Event()
        self._requests: dict[tuple[str, int], _Request] = {}
        self._runs: dict[tuple[str, int], _Run] = {}
        # By adapter: what was looked at last, and when it has to be looked at again although nothing changed.
        self._seen: dict[str, tuple[object, ...]] = {}
        self._next: dict[str, float] = {}

    def request(
        self, adapter: Adapter, cases: Iterable[str], reason: str, payer: Payer, *, unanswered: bool = False
    ) -> None:
        """Ask a version these cases, as soon as there is a gap; with `unanswered` those alone that have no score."""
        self._requests[adapter.name, adapter.version] = _Request(reason, list(cases), payer, unanswered)
        self._next[adapter.name] = 0.0
        self.wake()

    def wake(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def waiting(self, adapter: Adapter) -> bool:
        """The version is being asked, or about to be."""
        key = (adapter.name, adapter.version)
        return key in self._requests or key in self._runs

    async def run(self) -> None:
        """Until cancelled: run what is due."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.round()
            except LoradockError as error:
                log.warning("golden sets are not run now: %s", error.message)

    async def round(self) -> None:
        """Run what is due of each set; one that cannot be run stops no other."""
        await asyncio.to_thread(self._results.refresh)
        await self._held.refresh()
        self._forget_gone()
        for name in list(self._results.sets):
            try:
                await self._look(name)
            except LoradockError as error:
                log.warning("the golden set of %s is not run now: %s", name, error.message)
                self._results.failed(name)
                self._next[name] = self._clock() + PAUSE_SECONDS
            except Exception:  # whatever a set brings about, the sets of others are run
                log.exception("the golden set of %s is not run now", name)
                self._results.failed(name)
                self._next[name] = self._clock() + PAUSE_SECONDS
        await self._held.settle()

    async def _look(self, name: str) -> None:
        base = self._runner.owner(name)
        if base is None or not base.is_available or name not in self._registry:
            return
        wanted = self._wanted(name)
        row = self._results.sets[name]
        seen = (row.digest, row.stamp, base.model, *(adapter.id for adapter in wanted), self._registry.canary(name))
        if self._seen.get(name) == seen and self._clock() < self._next.get(name, 0.0):
            return
        golden = await asyncio.to_thread(self._results.golden, name)
        if golden is None:
            return
        self._seen[name], self._next[name] = seen, self._clock() + max(self._interval, RETRY_SECONDS)
        for adapter, repeats in wanted.items():
            await self._run_due(adapter, golden, repeats)
        await self._verdicts.consider(name, golden)
        await self._falls.consider(name, golden)

    def _wanted(self, name: str) -> dict[Adapter, bool]:
        """The versions that are asked, and whether once per interval: those that are."""
        live, share = self._registry.live(name), self._registry.canary(name)
        serving = [adapter for adapter in (live, share.adapter if share else None) if adapter]
        when = self._results.sets[name].when
        rest = [adapter for adapter in reversed(self._registry.versions(name)) if adapter not in serving]
        new = [adapter for adapter in rest if adapter.created >= when][:NEW_VERSIONS]
        named = {*self._requests, *self._held.versions}
        asked = [adapter for adapter in rest if (adapter.name, adapter.version) in named]
        return {**dict.fromkeys([*new, *asked], False), **dict.fromkeys(serving, True)}

    async def _run_due(self, adapter: Adapter, golden: GoldenSet, repeats: bool) -> None:
        key = (adapter.name, adapter.version)
        if await self._due(adapter, golden, repeats):
            if not await asyncio.to_thread(self._store.claim, adapter.name, self._store.me, CLAIM_SECONDS):
                self._next[adapter.name] = 0.0  # another server runs it
                return
            try:
                # Read again: another server may have asked them before it gave its claim back.
                if due := await self._due(adapter, golden, repeats):
                    await self._ask(adapter, golden, due, self._runs.setdefault(key, _Run(due.reason, self._clock())))
                    return
            finally:
                await asyncio.shield(asyncio.to_thread(self._store.release, adapter.name, self._store.me))
        # Another server asked the rest, or the set has changed.
        self._requests.pop(key, None)
        self._runs.pop(key, None)

    async def _due(self, adapter: Adapter, golden: GoldenSet, repeats: bool) -> _Request | None:
        """The cases that a version has to be asked now; None if there are none."""
        outcomes = await asyncio.to_thread(self._results.outcomes, adapter, golden)
        bases = {case: self._runner.basis(adapter, golden.by_key[case]) for case in golden.by_key}
        cases, again = due_cases(bases, outcomes, self._clock(), self._interval if repeats else 0.0)
        self._next[adapter.name] = min(self._next[adapter.name], again)
        if request := self._requests.get((adapter.name, adapter.version)):
            scored = {case for case, outcome in outcomes.items() if request.unanswered and outcome.score is not None}
            request.keys = [case for case in request.keys if case in golden.by_key and case not in scored]
            return replace(request, keys=list(request.keys)) if request.keys else None
        row = self._results.sets.get(adapter.name)
        if row is None or not cases:
            return None
        payer = Payer(adapter.tenant, Cause.GOLDEN, self._meter_of(row.key))
        return _Request("scheduled" if repeats and outcomes else "new", cases, payer)

    async def _ask(self, adapter: Adapter, golden: GoldenSet, wanted: _Request, run: _Run) -> None:
        """A slice of a run; what is left is due at the next look."""
        due, payer = wanted.keys, wanted.payer
        end = asyncio.get_running_loop().time() + SLICE_SECONDS
        try:
            while due and asyncio.get_running_loop().time() < end and self._goes_on(adapter, golden, payer):
                batch = due[: AT_ONCE if self._runner.is_idle(adapter) else 1]
                outcomes = await self._ask_some(adapter, golden, batch, payer)
                run.asked += len(outcomes)
                due = due[len(batch) :]
                if request := self._requests.get((adapter.name, adapter.version)):
                    request.keys = [case for case in request.keys if case not in batch]
                share = self._registry.canary(adapter.name)
                if share is not None and adapter in (share.adapter, self._registry.live(adapter.name)):
                    await self._verdicts.consider(adapter.name, golden)
            if due and payer.owes:
                self._next[adapter.name] = self._clock() + LOOK_SECONDS
            elif due:
                self._next[adapter.name] = 0.0
                self.wake()
            else:
                await self._end(adapter, golden, run)
        finally:
            self._retire(adapter)

    async def _ask_some(self, adapter: Adapter, golden: GoldenSet, batch: Sequence[str], payer: Payer) -> list[Outcome]:
        """The outcomes, in the database too; the first error of the engine is raised once those are kept."""
        asking = [self._runner.run(adapter, golden.by_key[case], payer) for case in batch]
        results = await asyncio.gather(*asking, return_exceptions=True)
        outcomes = [result for result in results if isinstance(result, Outcome)]
        sampled = [case for case in batch if golden.by_key[case].temperature > 0]
        if outcomes:
            await asyncio.to_thread(self._store.record, adapter.name, adapter.digest, outcomes, sampled)
            await asyncio.to_thread(self._store.claim, adapter.name, self._store.me, CLAIM_SECONDS)
        for outcome in outcomes:
            self._results.count(adapter, outcome.result)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return outcomes

    async def _end(self, adapter: Adapter, golden: GoldenSet, run: _Run) -> None:
        summary = await asyncio.to_thread(self._results.summary, adapter, golden)
        await asyncio.to_thread(
            self._store.add_run, adapter, golden.digest, run.reason, run.began, run.asked, summary.estimate
        )
        score, cases = summary.estimate.score, summary.estimate.cases
        self._events.publish(GoldenScored(adapter.name, adapter.version, score, cases, summary.complete))
        live, share = self._registry.live(adapter.name), self._registry.canary(adapter.name)
        serving = [version.digest for version in (adapter, live, share.adapter if share else None) if version]
        await asyncio.to_thread(self._store.prune, adapter.name, serving)
        # Whoever waits for the end of the run reads it in the database then.
        key = (adapter.name, adapter.version)
        self._runs.pop(key, None)
        # What was asked for during the run has cases left.
        if (request := self._requests.get(key)) and not request.keys:
            del self._requests[key]
        if summary.errors:
            self._next[adapter.name] = min(self._next[adapter.name], self._clock() + RETRY_SECONDS)

    def _forget_gone(self) -> None:
        """Sets and versions that were removed, here or by another server."""
        sets, reads = self._results.sets, self._registry
        there = {(name, adapter.version) for name in sets if name in reads for adapter in reads.versions(name)}
        self._requests = {key: request for key, request in self._requests.items() if key in there}
        self._runs = {key: run for key, run in self._runs.items() if key in there}
        self._seen = {name: seen for name, seen in self._seen.items() if name in sets}
        self._next = {name: when for name, when in self._next.items() if name in sets}
        self._verdicts.keep(sets)

    def _goes_on(self, adapter: Adapter, golden: GoldenSet, payer: Payer) -> bool:
        """The set is still this one, the version is there, and the key that pays may use more tokens."""
        row = self._results.sets.get(adapter.name)
        there = adapter.name in self._registry and adapter in self._registry.versions(adapter.name)
        return row is not None and row.digest == golden.digest and there and not payer.owes

    def _retire(self, adapter: Adapter) -> None:
        """A version that takes no traffic leaves the engine again."""
        reads, name = self._registry, adapter.name
        shares = [share.adapter for share in (reads.canary(name), reads.shadow(name)) if share]
        if adapter not in (reads.live(name), reads.pinned(name), *shares) and (base := self._runner.owner(name)):
            base.engine.retire(adapter.id)


def due_cases(
    bases: Mapping[str, str], outcomes: Mapping[str, Outcome], now: float, interval: float
) -> tuple[list[str], float]:
    """The cases that are to be asked now, in order; and when there are some again, if nothing changes.

    `bases` has what each case's outcome depends on today: one over another base model, or by another judge, is none.
    Without an interval a case that has a score is not asked again.
    """
    retry, repeat = [], []
    due: list[str] = []
    for case, basis in bases.items():
        outcome = outcomes.get(case)
        if outcome is None or outcome.basis != basis:
            due.append(case)
        elif outcome.score is None:
            retry.append((case, outcome.when + RETRY_SECONDS))
        elif interval:
            repeat.append((case, outcome.when + interval))
    due += [case for case, when in retry if when <= now]
    if any(when <= now for _, when in repeat):
        due += [case for case, when in repeat if when - TOGETHER * interval <= now]
    later = [when for case, when in (*retry, *repeat) if case not in due]
    return [case for case in bases if case in set(due)], min(later, default=float("inf"))
