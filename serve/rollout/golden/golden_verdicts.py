"""What a golden set decides: a canary that does worse on it, one that waits with `proved`, and a push that is held.

The canary is compared with the live version on the same cases (sequential.golden_comparison). A verdict goes to the
controller as every other does, with the reason `golden`. PROVED needs the golden set too, if there is one: a verdict of
the traffic waits here until the cases agree.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.errors import Conflict, LoradockError
from serve.events import CanaryVerdict, Events, PromotionHeld
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.golden.golden_store import GoldenStore, Outcome
from serve.rollout.policy import HOLD, Policies, Policy
from serve.sequential.golden_comparison import ALPHA_SHARE, MARGIN, GoldenComparison, compare
from serve.sequential.sequential_test import Verdict

log = logging.getLogger(__name__)

REASON = "golden"
# A comparison is complete when so many of the cases have a score of both.
COMPLETE = 0.9


@dataclass(frozen=True, slots=True)
class Standing:
    """How a canary stands on the golden set of its adapter, with `total` cases."""

    live: int
    canary: int
    comparison: GoldenComparison
    total: int

    def of(self, verdict: CanaryVerdict) -> bool:
        """The verdict is about the same two versions."""
        return (self.live, self.canary) == (verdict.live, verdict.canary)

    @property
    def complete(self) -> bool:
        return self.comparison.cases >= COMPLETE * self.total

    @property
    def too_few(self) -> bool:
        """Not even answers that are all alike would prove anything."""
        return self.total < self.comparison.needed_for_proof

    @property
    def agrees(self) -> bool:
        """Nothing here stands against PROVED."""
        comparison = self.comparison
        if comparison.worse or not self.complete:
            return False
        return comparison.proved or (self.too_few and comparison.gap < MARGIN)

    @property
    def verdict(self) -> Verdict:
        if self.comparison.worse:
            return Verdict.WORSE
        return Verdict.PROVED if self.complete and self.comparison.proved else Verdict.UNDECIDED

    def described(self, alpha: float) -> dict[str, Any]:
        """For the API."""
        return {
            "live": self.live,
            "canary": self.canary,
            "verdict": self.verdict.value,
            "of_cases": self.total,
            "alpha": alpha * ALPHA_SHARE,
            "agrees": self.agrees,
            "note": self._note(),
            **self.comparison.described(),
        }

    def _note(self) -> str:
        comparison, points = self.comparison, round(MARGIN * 100)
        notes = []
        if self.total < comparison.needed:
            notes.append(
                f"{self.total} cases are too few to decide a difference of {points} points: that typically takes "
                f"{comparison.needed}"
            )
        if self.too_few:
            notes.append(
                f"{self.total} cases cannot prove that it is no worse by {points} points, as "
                f"{comparison.needed_for_proof} could: for `proved` it is enough that it is not on these"
            )
        return "; ".join(notes)


class GoldenVerdicts:
    """For the event loop; publishes verdicts for the controller."""

    def __init__(
        self, store: GoldenStore, results: GoldenResults, registry: Registry, policies: Policies, events: Events
    ) -> None:
        self._store = store
        self._results = results
        self._registry = registry
        self._policies = policies
        self._events = events
        self._standings: dict[str, Standing] = {}
        # The pair that was called worse, by adapter; and verdicts of traffic that wait for the cases.
        self._announced: dict[str, str] = {}
        self._waiting: dict[str, CanaryVerdict] = {}

    def alpha(self, adapter: str) -> float:
        """What the other checks of a canary have of its alpha."""
        alpha = self._policies[adapter].alpha
        return alpha * (1 - ALPHA_SHARE) if adapter in self._results.sets else alpha

    # A canary

    async def consider(self, name: str, golden: GoldenSet) -> None:
        """Compare the adapter's canary with its live version as their outcomes are now, and act on it."""
        standing = await self._stand(name, golden)
        if standing is None:
            for state in (self._standings, self._announced, self._waiting):
                state.pop(name, None)
            if (row := self._results.sets.get(name)) and row.verdict:
                await asyncio.to_thread(self._store.announce, name, "")
            return
        self._standings[name] = standing
        if standing.comparison.worse:
            await self._announce(name, standing)
        elif standing.agrees and (verdict := self._waiting.pop(name, None)) and standing.of(verdict):
            self._events.publish(verdict)

    async def admitted(self, verdict: CanaryVerdict) -> CanaryVerdict | None:
        """The verdict, if no golden set stands against it; PROVED waits for its cases, and comes again then."""
        name = verdict.adapter
        if verdict.verdict is not Verdict.PROVED:
            return verdict
        try:
            await asyncio.to_thread(self._results.refresh)
            golden = await asyncio.to_thread(self._results.golden, name) if name in self._results.sets else None
            standing = await self._stand(name, golden) if golden else None
        except LoradockError as error:
            log.warning("%s@v%d waits for its golden set, which cannot be read: %s", name, verdict.canary, error)
            self._waiting[name] = verdict
            return None
        if standing is None or not standing.of(verdict) or standing.agrees:
            return verdict
        log.info("%s@v%d is proved by its traffic and waits for its golden set", name, verdict.canary)
        self._waiting[name] = verdict
        return None

    def keep(self, names: Container[str]) -> None:
        """No other adapter has a golden set (any more): what waited for one waits for nothing."""
        for name in [name for name in self._waiting if name not in names]:
            self._events.publish(self._waiting.pop(name))
        for name in [name for name in self._standings if name not in names]:
            del self._standings[name]
            self._announced.pop(name, None)

    def report(self, name: str) -> dict[str, Any] | None:
        """How the adapter's canary stands, for the API; None without a canary."""
        standing = self._standings.get(name)
        if standing is None:
            return None
        return {**standing.described(self._policies[name].alpha), "proved_waits": name in self._waiting}

    async def _stand(self, name: str, golden: GoldenSet) -> Standing | None:
        share, live = self._registry.canary(name), self._registry.live(name)
        if share is None or live is None:
            return None
        pairs = await asyncio.to_thread(self.pairs, live, share.adapter, golden)
        comparison = compare(pairs, self._policies[name].alpha)
        return Standing(live.version, share.adapter.version, comparison, len(golden.cases))

    def pairs(self, live: Adapter, canary: Adapter, golden: GoldenSet) -> list[tuple[float, float]]:
        """First scores of both on the same case over the same base, by the same judge. Blocks."""
        ours, theirs = (self._results.outcomes(adapter, golden) for adapter in (live, canary))
        both = [(ours[key], theirs[key]) for key in golden.by_key if key in ours and key in theirs]
        return [scores for pair in both if (scores := _paired(*pair)) is not None]

    async def _announce(self, name: str, standing: Standing) -> None:
        pair = f"{standing.live}:{standing.canary}"
        if self._announced.get(name) == pair:
            return
        row = self._results.sets.get(name)
        repeated = row is not None and row.verdict == pair
        await asyncio.to_thread(self._store.announce, name, pair)
        self._announced[name] = pair
        evidence = {"live": standing.live, "canary": standing.canary, "golden": standing.comparison.described()}
        self._events.publish(
            CanaryVerdict(name, standing.live, standing.canary, Verdict.WORSE, REASON, evidence, repeated)
        )

    # A push or a promote

    async def holds(self, name: str) -> bool:
        """A pushed version of this adapter waits for its score before it takes traffic."""
        if self._policies[name].golden_min <= 0:
            return False
        await asyncio.to_thread(self._results.refresh)
        return name in self._results.sets

    async def hold(self, adapter: Adapter, by: str, why: str) -> None:
        """The version is to take traffic once its score is good enough."""
        await asyncio.to_thread(self._store.hold, adapter, by, why)
        self._events.publish(PromotionHeld(adapter.name, adapter.version, by))

    async def check(self, adapter: Adapter, policy: Policy) -> None:
        """Conflict, if the policy holds this version back because of its golden set."""
        name, version = adapter.name, adapter.version
        if policy.worse != HOLD and policy.golden_min <= 0:
            return
        await asyncio.to_thread(self._results.refresh)
        if name not in self._results.sets:
            return
        standing = self._standings.get(name)
        if policy.worse == HOLD and standing and standing.canary == version and standing.comparison.worse:
            raise Conflict(
                f"version {version} did worse than version {standing.live} on {standing.comparison.cases} golden "
                'cases, and this adapter\'s policy holds it back: promote it with "at_once": true if you want it all '
                "the same"
            )
        if policy.golden_min <= 0:
            return
        golden = await asyncio.to_thread(self._results.golden, name)
        if golden is None:
            return
        summary = await asyncio.to_thread(self._results.summary, adapter, golden)
        if not summary.complete or (summary.estimate.score or 0.0) < policy.golden_min:
            score = summary.estimate.score
            state = "has no score yet" if score is None else f"scores {score:.3f} on {summary.estimate.cases} cases"
            raise Conflict(
                f"version {version} {state} of {len(golden.cases)} in the golden set, and this adapter's policy asks "
                f'for {policy.golden_min:g} on all: promote it with "at_once": true if you want it all the same'
            )


def _paired(live: Outcome, canary: Outcome) -> tuple[float, float] | None:
    if live.first_score is None or canary.first_score is None or live.basis != canary.basis:
        return None
    return live.first_score, canary.first_score
