"""Tells when what is live scores less on its golden set than what was live before it, or than it did itself.

The scores are those of complete runs in the database, so that a restart changes nothing. What was told stands in the
adapter's history: a fall is told once, by whichever server sees it first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.events import Events, GoldenScoreFell
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.golden.golden_store import GoldenStore
from serve.telemetry.rendered.rules import SCORE_FELL

log = logging.getLogger(__name__)

WHO = "golden"
KIND = "golden_fell"
DAY = 86_400.0


class GoldenFalls:
    """Publishes each fall."""

    def __init__(
        self,
        store: GoldenStore,
        results: GoldenResults,
        registry: Registry,
        events: Events,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._results = results
        self._registry = registry
        self._events, self._clock = events, clock
        # What was looked at last, by adapter: the live version and its score.
        self._seen: dict[str, tuple[int, float]] = {}

    async def consider(self, name: str, golden: GoldenSet) -> None:
        """Compare the live version's score, if all of its cases have one, with those before it."""
        live = self._registry.live(name)
        summary = self._results.known(live) if live else None
        if live is None or summary is None or not summary.complete or summary.estimate.score is None:
            return
        now = live.version, summary.estimate.score
        if self._seen.get(name) != now:
            await asyncio.to_thread(self._look, live, now[1], golden)
            self._seen[name] = now  # then only: what could not be told is looked at again

    def _look(self, live: Adapter, score: float, golden: GoldenSet) -> None:
        history = self._registry.history(live.name)
        fall = self._fall(live, score, golden, history)
        if fall is None or self._was_told(history, fall):
            return
        log.warning("%s: %s", live.tag, fall.text)
        self._registry.note(live.name, KIND, live.version, by=WHO, why=fall.text)
        self._events.publish(fall)

    def _fall(
        self, live: Adapter, score: float, golden: GoldenSet, history: list[dict[str, Any]]
    ) -> GoldenScoreFell | None:
        """By more than `SCORE_FELL` less than the version's own run before, or than what was live within a day."""
        earlier = self._live_before(live, history)
        known: dict[int, list[float]] = {}
        for run in self._store.runs(live.name):
            if run["set"] == golden.digest and run["cases"] == len(golden.cases) and run["score"] is not None:
                known.setdefault(run["version"], []).append(run["score"])  # the last one first
        scores = {version: runs[0] for version, runs in known.items() if version == earlier}
        if len(own := known.get(live.version, [])) > 1:
            scores[live.version] = own[1]
        if not scores:
            return None
        before = max(scores, key=scores.__getitem__)
        if scores[before] - score <= SCORE_FELL:
            return None
        cases = len(golden.cases)
        return GoldenScoreFell(live.name, live.version, score, before, scores[before], cases, golden.digest)

    def _live_before(self, live: Adapter, history: list[dict[str, Any]]) -> int | None:
        """What was live until this version became it, if that was within a day."""
        for change in reversed(history):
            if change["what"] in ("promote", "rollback", "fallback") and change["to_version"] == live.version:
                was: int | None = change["from_version"]
                return was if change["when"] > self._clock() - DAY else None
        return None

    def _was_told(self, history: list[dict[str, Any]], fall: GoldenScoreFell) -> bool:
        """Of a version that came in the place of a better one, once; of one that does worse than before, each time."""
        version = fall.version
        return any(
            change["when"] > self._clock() - DAY and (fall.before != version or change["why"] == fall.text)
            for change in history
            if change["what"] == KIND and change["from_version"] == version
        )
