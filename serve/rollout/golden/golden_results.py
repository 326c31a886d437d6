"""What versions answered to their golden sets, for the API and as metrics."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.rollout.golden.golden_scoring import CONFIDENCE, Estimate, Result, estimate
from serve.rollout.golden.golden_set import GoldenCase, GoldenSet
from serve.rollout.golden.golden_store import GoldenStore, Outcome, SetRow

# Golden sets whose cases are kept in memory; a set is at most 1 MiB.
DOCUMENTS = 32
ONCE = (
    "each case counts once a version: answers at temperature 0 repeat, and the same case again is no new evidence; "
    "of a case with a temperature the score is the mean over its runs"
)
_LABELS = ("adapter", "version")


@dataclass(frozen=True, slots=True)
class Summary:
    """A version's score on its golden set as it is now; `last` is the time of its latest answer, in seconds."""

    estimate: Estimate
    passed: int
    errors: int
    missing: int
    last: float

    @property
    def complete(self) -> bool:
        """Every case has a score."""
        return not self.errors and not self.missing

    def described(self) -> dict[str, Any]:
        now = self.estimate
        return {
            "score": _rounded(now.score),
            "low": round(now.low, 4),
            "high": round(now.high, 4),
            "confidence": CONFIDENCE,
            "interval": now.method,
            "cases": now.cases,
            "passed": self.passed,
            "errors": self.errors,
            "missing": self.missing,
            "last_run": round(self.last, 3) if self.last else None,
        }


def summarized(golden: GoldenSet, outcomes: Mapping[str, Outcome]) -> Summary:
    """The score of a version from its outcomes, by case."""
    here = [outcomes[key] for key in golden.by_key if key in outcomes]
    scored = [outcome.score for outcome in here if outcome.score is not None]
    return Summary(
        estimate(scored),
        passed=sum(outcome.result is Result.PASS for outcome in here),
        errors=len(here) - len(scored),
        missing=len(golden.cases) - len(here),
        last=max((outcome.when for outcome in here), default=0.0),
    )


class GoldenResults(Collector):
    """Methods that read the database block; `sets` and `collect` do not. `label` gives a version's metric labels."""

    def __init__(
        self,
        store: GoldenStore,
        registry: Registry,
        label: Callable[[str, str], tuple[str, str]] = lambda adapter, version: (adapter, version),
    ) -> None:
        self.store = store
        self.registry = registry
        self._label = label
        # The adapters that have a golden set, as of the last look.
        self.sets: Mapping[str, SetRow] = {}
        self._documents: OrderedDict[tuple[str, str], GoldenSet] = OrderedDict()
        self._lock = threading.Lock()
        self._summaries: dict[tuple[str, int], Summary] = {}
        self._counts: dict[tuple[str, int], dict[Result, int]] = {}
        # The set's digest at the last look at a version, and how many of its cases had no score then.
        self._unscored: dict[tuple[str, int], tuple[str, int]] = {}
        # Looks at a set that ended in an error, by adapter.
        self._failures: dict[str, int] = {}

    def refresh(self) -> None:
        """See which adapters have a set, also by what other servers did."""
        sets = self.store.sets()
        there = {(adapter.name, adapter.version) for adapter in self.registry.adapters() if adapter.name in sets}
        with self._lock:
            self.sets = sets
            self._summaries = {key: summary for key, summary in self._summaries.items() if key in there}
            self._counts = {key: counts for key, counts in self._counts.items() if key in there}
            self._unscored = {key: look for key, look in self._unscored.items() if key in there}
            self._failures = {name: self._failures.get(name, 0) for name in sets}

    def golden(self, name: str) -> GoldenSet | None:
        """The adapter's golden set."""
        row = self.sets.get(name)
        if row is not None and (document := self._documents.get((name, row.digest))):
            return document
        stored = self.store.get(name)
        if stored is None:
            return None
        row, golden = stored
        with self._lock:
            self._documents[name, row.digest] = golden
            while len(self._documents) > DOCUMENTS:
                self._documents.popitem(last=False)
        return golden

    def outcomes(self, adapter: Adapter, golden: GoldenSet, *, answers: bool = False) -> dict[str, Outcome]:
        """How a version did, by case; its metrics follow."""
        outcomes = self.store.outcomes(adapter.name, adapter.digest, answers=answers)
        key = (adapter.name, adapter.version)
        with self._lock:
            self._counts.setdefault(key, dict.fromkeys(Result, 0))
            summary = summarized(golden, outcomes)
            self._unscored[key] = golden.digest, summary.errors + summary.missing
            if outcomes:
                self._summaries[key] = summary
            else:
                self._summaries.pop(key, None)  # of the set before
        return outcomes

    def summary(self, adapter: Adapter, golden: GoldenSet) -> Summary:
        return summarized(golden, self.outcomes(adapter, golden))

    def count(self, adapter: Adapter, result: Result) -> None:
        """One case was asked."""
        with self._lock:
            counts = self._counts.setdefault((adapter.name, adapter.version), dict.fromkeys(Result, 0))
            counts[result] += 1

    def failed(self, name: str) -> None:
        """The adapter's set could not be run, because of an error."""
        with self._lock:
            self._failures[name] = self._failures.get(name, 0) + 1

    def known(self, adapter: Adapter) -> Summary | None:
        """A version's score as of the last look, without the database; None while there is none."""
        return self._summaries.get((adapter.name, adapter.version))

    def described(self, name: str) -> dict[str, Any] | None:
        """The set itself as of the last look, for the API."""
        row, golden = self.sets.get(name), self.golden(name)
        if row is None or golden is None:
            return None
        tokens = sum(case.tokens for case in golden.cases)
        return {"digest": row.digest, "by": row.who, "updated": row.when, "count": len(golden.cases), "tokens": tokens}

    def report(self, name: str) -> dict[str, Any]:
        """The score of each version that was asked, and the latest runs."""
        golden = self.golden(name)
        if golden is None:
            return {"versions": [], "runs": []}
        asked = set(self.store.digests(name))
        versions = [
            {"version": adapter.version, "id": adapter.id, **self.summary(adapter, golden).described()}
            for adapter in self.registry.versions(name)
            if adapter.digest in asked
        ]
        runs = [{key: _rounded(value) for key, value in run.items()} for run in self.store.runs(name)]
        return {"note": ONCE, "versions": versions, "runs": runs}

    def cases(self, adapter: Adapter, *, answers: bool) -> list[dict[str, Any]]:
        """Each case's outcome, in the order of the document; with the `answers` only for whoever may read them."""
        golden = self.golden(adapter.name)
        if golden is None:
            return []
        outcomes = self.outcomes(adapter, golden, answers=answers)
        return [
            _case_described(number, case, outcomes.get(case.key), answers)
            for number, case in enumerate(golden.cases, 1)
        ]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            summaries, counts = dict(self._summaries), {key: dict(results) for key, results in self._counts.items()}
        families = _Families()
        for (name, version), summary in summaries.items():
            labels = (name, f"v{version}")
            if self._label(*labels) == labels and summary.estimate.score is not None:
                families.add_score(labels, summary)
        for (name, version), results in counts.items():
            labels = (name, f"v{version}")
            if self._label(*labels) == labels:
                for result, count in results.items():
                    families.cases.add_metric((*labels, result.value), count)
        self._collect_sets(families)
        yield from families

    def _collect_sets(self, families: _Families) -> None:
        """What there is of each set: what its live version and its canary lack, and the live one's whole score."""
        with self._lock:
            unscored = dict(self._unscored)
            failures = dict(self._failures)
            sets = self.sets
        for name, row in sets.items():
            families.failures.add_metric((name,), failures.get(name, 0))
            live, share = self.registry.live(name), self.registry.canary(name)
            for adapter in (live, share.adapter if share else None):
                if adapter is None or (name, adapter.version) not in unscored:
                    continue
                digest, cases = unscored[name, adapter.version]
                labels = (name, f"v{adapter.version}")
                if self._label(*labels) == labels:
                    families.unscored.add_metric(labels, cases)
                summary = self.known(adapter)
                if adapter == live and summary and not cases and digest == row.digest:
                    families.live.add_metric((name, digest[:12]), summary.estimate.score or 0.0)


class _Families:
    """The series of all golden sets."""

    def __init__(self) -> None:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        self.score = gauge(
            "loradock_golden_score", "Mean score of a version on its golden set, 0 to 1.", labels=_LABELS
        )
        self.bounds = gauge(
            "loradock_golden_score_bound",
            "Where the mean score of all cases like those of the golden set lies with 95 % confidence, by bound: low "
            "or high.",
            labels=(*_LABELS, "bound"),
        )
        self.live = gauge(
            "loradock_golden_live_score",
            "Mean score of whichever version is live, 0 to 1, once each case of the golden set has a score. `set` is "
            "the set's digest: scores of two sets cannot be compared.",
            labels=("adapter", "set"),
        )
        self.last = gauge(
            "loradock_golden_last_run_timestamp_seconds",
            "When a version last answered a case of its golden set, in seconds since 1970.",
            labels=_LABELS,
        )
        self.unscored = gauge(
            "loradock_golden_unscored_cases",
            "Cases of the golden set that the live version or the canary has no score for: not asked yet, or the "
            "answer or the judge was an error.",
            labels=_LABELS,
        )
        self.cases = counter(
            "loradock_golden_cases",
            "Cases of golden sets that a version was asked, by result, since the server started.",
            labels=(*_LABELS, "result"),
        )
        self.failures = counter(
            "loradock_golden_run_failures",
            "Attempts to run an adapter's golden set that ended in an error of the engine or the database, since the "
            "server started. The next one follows within a minute.",
            labels=("adapter",),
        )

    def add_score(self, labels: tuple[str, str], summary: Summary) -> None:
        estimate = summary.estimate
        self.score.add_metric(labels, estimate.score or 0.0)
        self.bounds.add_metric((*labels, "low"), estimate.low)
        self.bounds.add_metric((*labels, "high"), estimate.high)
        self.last.add_metric(labels, summary.last)

    def __iter__(self) -> Iterator[Metric]:
        return iter(vars(self).values())


def _case_described(number: int, case: GoldenCase, outcome: Outcome | None, answers: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"case": number, "name": case.name, "expects": case.expectations[0]}
    if outcome is None:
        return {**described, "result": None}
    described |= {
        "result": outcome.result.value,
        "score": _rounded(outcome.score),
        "runs": outcome.runs,
        "changed": outcome.changed,
        "when": outcome.when,
    }
    return described | ({"answer": outcome.answer, "detail": outcome.detail} if answers else {})


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
