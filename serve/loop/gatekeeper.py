"""Scores the two versions on every part of the gate: new examples, earlier references, the golden set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from serve.adapters.adapter import Adapter
from serve.engine.payer import Cause, Payer
from serve.loop.gate import GOLDEN, NEW, REFERENCE, Gate, Part, compared
from serve.loop.likelihood import Example
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Loop
from serve.loop.replays import Replays
from serve.loop.topics import topics
from serve.rollout.golden.golden import Golden
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.loop_policy import GatePolicy

# Examples that are scored between two looks whether the work is to go on.
AT_ONCE = 8


class Scorer(Protocol):
    """Scores from 0 to 1; None for an example that no version can be asked."""

    async def scores(self, version: Adapter, examples: Sequence[Example]) -> list[float | None]: ...


class Interrupted(Exception):
    """The work is not to go on here."""


class Gatekeeper:
    """`scorer` asks the engine, `golden` has the golden scores; `replays` are for whoever says yes or no."""

    def __init__(self, rows: LoopRows, scorer: Scorer, golden: Golden, replays: Replays) -> None:
        self._rows = rows
        self.scorer = scorer
        self._golden = golden
        self.replays = replays

    async def judge(
        self, loop: Loop, live: Adapter, candidate: Adapter, policy: GatePolicy, goes_on: Callable[[], bool]
    ) -> Gate | None:
        """What the parts come to; None while the golden set is still being asked. Interrupted if it is not to go on."""
        alpha = loop.state.alpha
        golden = await self._golden_pairs(live, candidate)
        if golden is None:
            return None
        rows = self._rows
        asked = [(NEW, "", loop.state.held_out)]
        asked += [(REFERENCE, one.label or "", one.id) for one in await asyncio.to_thread(rows.references.kept, loop)]
        parts: list[Part] = []
        for kind, label, id in asked:
            examples = await asyncio.to_thread(rows.references.examples, id)
            scored = await self._scored(live, candidate, examples, goes_on)
            clusters, pairs = [example.counted_as for example, _ in scored], [pair for _, pair in scored]
            split = await asyncio.to_thread(topics, [example for example, _ in scored]) if kind == NEW else ()
            parts.append(compared(kind, label, pairs, policy.tolerance, alpha, clusters, split))
        if golden:
            parts.append(compared(GOLDEN, "", golden, policy.golden, alpha))
        return Gate(alpha, tuple(parts))

    async def _scored(
        self, live: Adapter, candidate: Adapter, examples: Sequence[Example], goes_on: Callable[[], bool]
    ) -> list[tuple[Example, tuple[float, float]]]:
        """The examples that both versions have a score for, with the two."""
        scored: list[tuple[Example, tuple[float, float]]] = []
        for at in range(0, len(examples), AT_ONCE):
            if not goes_on():
                raise Interrupted
            some = examples[at : at + AT_ONCE]
            ours = await self.scorer.scores(live, some)
            theirs = await self.scorer.scores(candidate, some)
            both = zip(some, ours, theirs, strict=True)
            scored += [(example, (a, b)) for example, a, b in both if a is not None and b is not None]
        return scored

    async def _golden_pairs(self, live: Adapter, candidate: Adapter) -> list[tuple[float, float]] | None:
        """Of the cases that both have a score of; None while one of them lacks answers that are on their way."""
        results = self._golden.results
        await asyncio.to_thread(results.refresh)
        golden = await asyncio.to_thread(results.golden, live.name) if live.name in results.sets else None
        if golden is None:
            return []
        waiting = [await self._waits(version, golden) for version in (live, candidate)]
        if any(waiting):
            return None
        return await asyncio.to_thread(self._golden.verdicts.pairs, live, candidate, golden)

    async def _waits(self, version: Adapter, golden: GoldenSet) -> bool:
        """The version has cases to answer, which it is asked now."""
        runs = self._golden.runs
        if runs.waiting(version):
            return True
        outcomes = await asyncio.to_thread(self._golden.results.outcomes, version, golden)
        missing = [key for key in golden.by_key if key not in outcomes]
        if missing:
            payer = Payer(version.tenant, Cause.LOOP, None)
            runs.request(version, missing, "loop", payer, unanswered=True)
        return bool(missing)
