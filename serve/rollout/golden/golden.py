"""Golden sets as a whole: kept, run, scored and acted on; each part is a module `golden_*` beside this one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from serve.adapters.adapter import Adapter
from serve.auth.auth import Caller
from serve.engine.payer import Cause, Payer
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_runner import GoldenRunner
from serve.rollout.golden.golden_schedule import GoldenRuns
from serve.rollout.golden.golden_set import GoldenSet, asked
from serve.rollout.golden.golden_store import GoldenStore
from serve.rollout.golden.golden_verdicts import GoldenVerdicts


class Golden:
    """`results` for whoever reads, `verdicts` for whoever promotes, `runs` for whoever wants a run."""

    def __init__(
        self,
        store: GoldenStore,
        results: GoldenResults,
        verdicts: GoldenVerdicts,
        runner: GoldenRunner,
        runs: GoldenRuns,
    ) -> None:
        self._store = store
        self.results = results
        self.verdicts = verdicts
        self.runner = runner
        self.runs = runs
        self._lots = random.Random()

    def put(self, name: str, golden: GoldenSet, by: Caller, live: Adapter | None) -> list[str]:
        """Keep the set in the place of an earlier one; the cases that `live` has not answered yet. Blocks."""
        self._store.put(name, golden, by.name, by.key)
        self.results.refresh()
        outcomes = self.results.outcomes(live, golden) if live else {}
        return [case for case in golden.by_key if case not in outcomes or outcomes[case].score is None]

    async def grade_shadow(
        self, shadow: Adapter, fields: Mapping[str, Any], answers: tuple[str, str]
    ) -> tuple[float, float] | None:
        """What the adapter's judge gives the client's answer and the shadow's, if this request is in the sample."""
        if shadow.name not in self.results.sets:
            return None
        golden = await asyncio.to_thread(self.results.golden, shadow.name)
        sampled = golden.shadow if golden else None
        question = asked(fields)
        if sampled is None or not question or self._lots.random() >= sampled.share:
            return None
        payer = Payer(shadow.tenant, Cause.JUDGE, None)
        grades = [await self.runner.grade(sampled.judge, shadow.tenant, question, answer, payer) for answer in answers]
        live, own = (grade.value for grade in grades)
        return None if live is None or own is None else (live, own)

    def remove(self, name: str) -> bool:
        """Forget the adapter's set with its outcomes; whether there was one. Blocks."""
        there = self._store.remove(name)
        self.results.refresh()
        return there

    def forget(self, gone: Adapter, *, last: bool) -> None:
        """A version was removed; with the adapter's `last` one its set goes too. Blocks."""
        if gone.name not in self.results.sets:
            return
        if last:
            self.remove(gone.name)
        else:
            self._store.forget(gone.name, [gone.digest])
