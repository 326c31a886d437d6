"""What the dashboard shows, in as many bytes as it can show: a thousand adapters by what they need, a page at a time.

First come adapters with a problem, then those with traffic, each as a card with its versions; the rest are rows. A
card has the versions that matter: live, canary, shadow, pinned, asked lately, with a problem, and the newest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.adapters.adapter import Adapter
from serve.adapters.registry.snapshot import SnapshotReader
from serve.asgi.exchange_worker import ExchangeWorker
from serve.auth.auth import Caller
from serve.drift.monitor import DriftMonitor
from serve.gateway.router import manages
from serve.names import short_name, tenant_of
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.canary.shadow_agreement import ShadowAgreement
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.sequential.sequential_test import Verdict
from serve.telemetry.recent import Recent

# Adapters that are shown with their versions, and how many versions of each.
CARDS, VERSIONS = 12, 6
# Older versions at a time.
PAGE = 20
# From this part of failed requests on a version has a problem.
FAILING = 0.01
# Statistics of a signal of drift, the largest ones.
EFFECTS = 4
# The worst first.
KINDS = ("load", "errors", "canary", "drift", "golden")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Moment:
    """What is read at once, on the event loop: the registry; requests and failures of the last half hour by adapter
    and version; where versions are, by their ids; how canaries do on golden sets."""

    registry: SnapshotReader
    traffic: Mapping[tuple[str, str], tuple[int, int]]
    states: Mapping[str, str]
    golden: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Standing:
    """One adapter among many: what is wrong with it, as (kind, version, text), and how often it was asked."""

    full: str
    requests: int
    errors: int
    problems: Sequence[tuple[str, int | None, str]] = field(default_factory=tuple)

    @property
    def stands_out(self) -> bool:
        return bool(self.problems) or self.requests > 0

    @property
    def rank(self) -> tuple[int, int, str]:
        worst = min((KINDS.index(kind) for kind, _, _ in self.problems), default=len(KINDS))
        return worst, -self.requests, self.full


def _counts(caller: Caller, name: str, moment: Moment) -> bool:
    """Whether requests of that name are the caller's to see; a base's are the operators'."""
    return caller.operator or (name in moment.registry and manages(caller, name))


# ---- what is wrong


def _load_problems(full: str, moment: Moment) -> list[tuple[str, int | None, str]]:
    failed = [each for each in _serving(moment, full) if moment.states.get(each.id) == "failed"]
    return [("load", each.version, "it cannot be loaded, and its requests fail: the log says why") for each in failed]


def _error_problems(counts: Mapping[str, tuple[int, int]]) -> list[tuple[str, int | None, str]]:
    failing = [(version, *count) for version, count in counts.items() if count[1] >= FAILING * count[0] and count[1]]
    return [
        ("errors", int(version[1:]) if version[1:].isdecimal() else None, f"{errors} of {requests} requests failed")
        for version, requests, errors in failing
    ]


def _drift_problems(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None, str]]:
    return [
        ("drift", int(row["version"][1:]), row["moved"].get(signal, f"the {signal} signal has drifted"))
        for row in rows
        for signal in row["drifted"]
        if row["version"][1:].isdecimal()
    ]


def _serving(moment: Moment, full: str) -> list[Adapter]:
    """Versions that get traffic."""
    registry = moment.registry
    shares = [share.adapter for share in (registry.canary(full), registry.shadow(full)) if share]
    return [adapter for adapter in (registry.live(full), *shares) if adapter]


# ---- how it is told


def _that_matter(moment: Moment, standing: Standing) -> list[Adapter]:
    """The versions with traffic, then the one that a rollback goes to, then others by number, the latest first."""
    registry, full = moment.registry, standing.full
    pinned = registry.pinned(full)
    before = registry.before(full)
    versions = registry.versions(full)[::-1]
    troubled = {version for _, version, _ in standing.problems}
    others = [
        each
        for each in versions
        if each in (pinned, versions[0]) or each.version in troubled or (full, f"v{each.version}") in moment.traffic
    ]
    earlier = [each for each in versions if each.version == before]
    return list(dict.fromkeys([*_serving(moment, full), *earlier, *others]))[:VERSIONS]


def _drift(report: Mapping[str, Any] | None) -> Json | None:
    """Of a version's report what is drawn: the evidence of each signal, what it takes, and how far it moved."""
    if report is None:
        return None
    fields = ("phase", "reference_requests", "reference_needed", "log_evidence", "log_threshold", "alarmed", "since")
    signals = []
    for name, signal in report["signals"].items():
        largest = sorted(signal["effects"].items(), key=lambda effect: -abs(effect[1] or 0.0))[:EFFECTS]
        signals.append({"signal": name, **{field: signal[field] for field in fields}, "effects": dict(largest)})
    return {
        "signals": signals,
        "thinning": report.get("thinning"),
        "probe": report.get("probe"),
        "alarms": {kind: moved.get("text", "") for kind, moved in report["alarms"].items()},
    }


class Overview:
    """Reads what other parts know."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        recent: Recent,
        golden: Golden,
        drift_monitor: DriftMonitor,
        canary_monitor: CanaryMonitor,
        shadow_agreement: ShadowAgreement,
        exchange_worker: ExchangeWorker,
        grafana_url: str,
    ) -> None:
        self._registry = lifecycle.registry
        self._fleet = lifecycle.fleet
        self._recent = recent
        self._golden = golden
        self._drift_monitor = drift_monitor
        self._canary_monitor = canary_monitor
        self._shadow_agreement = shadow_agreement
        self._exchange_worker = exchange_worker
        self._grafana_url = grafana_url.rstrip("/")

    def _moment(self) -> Moment:
        states: dict[str, str] = {}
        for base in self._fleet:
            states |= base.engine.states
        sets, verdicts = self._golden.results.sets, self._golden.verdicts
        reports = {name: report for name in sets if (report := verdicts.report(name))}
        return Moment(self._registry.frozen(), self._recent.totals(), states, reports)

    async def page(self, caller: Caller, search: str, offset: int, limit: int) -> Json:
        """The adapters that the caller may change and whose name holds `search`: cards, then a page of the rest."""
        moment = self._moment()
        standings = await asyncio.to_thread(self._standings, caller, moment)
        wanted = search.strip().casefold()
        matching = [each for each in standings if wanted in short_name(each.full, caller.tenant).casefold()]
        out = sorted((each for each in matching if each.stands_out), key=lambda each: each.rank)
        first = out[:CARDS]
        rest = out[CARDS:] + sorted((each for each in matching if not each.stands_out), key=lambda each: each.full)
        chosen = [(each, _that_matter(moment, each)) for each in first]
        recent = {each.full: self._columns(versions) for each, versions in chosen}
        cards = await asyncio.to_thread(
            lambda: [self._card(caller, moment, each, versions, recent[each.full]) for each, versions in chosen]
        )
        return {
            "object": "overview",
            "operator": caller.operator,
            "watching": self._exchange_worker.running,
            "started": int(self._recent.began),
            "grafana": (caller.operator and self._grafana_url) or None,
            "now": self._recent.now(lambda full: _counts(caller, full, moment)),
            "engines": self._engines(caller),
            "adapters": len(standings),
            "matching": len(matching),
            "with_problems": sum(bool(each.problems) for each in matching),
            "with_traffic": sum(each.requests > 0 for each in matching),
            "first": cards,
            "rest": len(rest),
            "offset": offset,
            "data": [self._row(caller, moment, each) for each in rest[offset : offset + limit]],
        }

    async def adapter(self, caller: Caller, full: str, before: int | None) -> Json:
        """The card of one adapter; with `before`, its versions are the latest ones with a smaller number."""
        moment = self._moment()
        (standing,) = await asyncio.to_thread(self._standings, caller, moment, [full])
        if before is None:
            versions = _that_matter(moment, standing)
        else:
            older = [version for version in moment.registry.versions(full) if version.version < before]
            versions = older[: -PAGE - 1 : -1]
        recent = self._columns(versions)
        return await asyncio.to_thread(self._card, caller, moment, standing, versions, recent)

    def _engines(self, caller: Caller) -> list[Json]:
        """Phase and reason are in the 503 that anybody gets; how busy an engine is, is the operators' to know."""
        rows = []
        for base in self._fleet:
            row: Json = {"name": base.name, "phase": base.phase, "ready": base.is_ready, "reason": base.reason}
            if caller.operator:
                waiting = base.engine.queue.waiting + base.backend.waiting
                row |= {"running": base.backend.running, "waiting": waiting, "memory_bytes": base.backend.memory}
            rows.append(row)
        return rows

    def _standings(self, caller: Caller, moment: Moment, names: Sequence[str] | None = None) -> list[Standing]:
        if names is None:
            names = [full for full in moment.registry.names() if manages(caller, full)]
        traffic: dict[str, dict[str, tuple[int, int]]] = {}
        for (name, version), count in moment.traffic.items():
            traffic.setdefault(name, {})[version] = count
        drifted = self._drift_monitor.summary()
        rows = []
        for full in names:
            counts = traffic.get(full, {})
            requests, errors = (sum(each[place] for each in counts.values()) for place in (0, 1))
            problems = (
                *_load_problems(full, moment),
                *_error_problems(counts),
                *self._canary_problems(full, moment),
                *_drift_problems(drifted.get(full, ())),
                *self._golden_problems(full, moment),
            )
            rows.append(Standing(full, requests, errors, problems))
        return rows

    def _canary_problems(self, full: str, moment: Moment) -> list[tuple[str, int | None, str]]:
        if moment.registry.canary(full) is None:
            return []
        problems: list[tuple[str, int | None, str]] = []
        report, golden = self._canary_monitor.report(full), moment.golden.get(full)
        if report and report["verdict"] == Verdict.WORSE:
            problems.append(("canary", report["canary"], f"the canary does worse than v{report['live']}"))
        if golden and golden["verdict"] == Verdict.WORSE:
            problems.append(("canary", golden["canary"], f"it does worse than v{golden['live']} on the golden set"))
        return problems

    def _golden_problems(self, full: str, moment: Moment) -> list[tuple[str, int | None, str]]:
        live = moment.registry.live(full)
        summary = self._golden.results.known(live) if live and full in self._golden.results.sets else None
        if live is None or summary is None or not summary.errors:
            return []
        cases = "1 golden case has" if summary.errors == 1 else f"{summary.errors} golden cases have"
        return [("golden", live.version, f"{cases} no score, because of an error")]

    def _row(self, caller: Caller, moment: Moment, standing: Standing) -> Json:
        full, registry = standing.full, moment.registry
        live = registry.live(full)
        canary = registry.canary(full)
        shadow = registry.shadow(full)
        versions, owner = registry.versions(full), self._fleet.owner(full)
        return {
            "name": short_name(full, caller.tenant),
            "tenant": tenant_of(full),
            "visibility": "shared" if registry.shared(full) else "private",
            "engine": owner.name if owner else registry.base(full),
            "ready": owner is not None and owner.is_ready,
            "live": live.version if live else None,
            "before": registry.before(full),
            "canary": {"version": canary.adapter.version, "weight": canary.weight} if canary else None,
            "shadow": {"version": shadow.adapter.version, "weight": shadow.weight} if shadow else None,
            "state": moment.states.get(live.id, "disk") if live else None,
            "versions_total": len(versions),
            "pushed": int(versions[-1].created),
            "requests": standing.requests,
            "errors": standing.errors,
            "problems": [{"kind": kind, "version": version, "text": text} for kind, version, text in standing.problems],
        }

    def _columns(self, versions: Sequence[Adapter]) -> dict[int, Json | None]:
        return {each.version: self._recent.columns(each.name, f"v{each.version}") for each in versions}

    def _card(
        self,
        caller: Caller,
        moment: Moment,
        standing: Standing,
        versions: Sequence[Adapter],
        recent: Mapping[int, Json | None],
    ) -> Json:
        full = standing.full
        reports = {report["version"]: report for report in self._drift_monitor.report(full)}
        pinned = moment.registry.pinned(full)
        return {
            **self._row(caller, moment, standing),
            "canary_report": self._canary_monitor.report(full),
            "golden_canary": moment.golden.get(full),
            "shadow_agreement": self._shadow_agreement.report(full)[:2],
            "versions": [
                {
                    "version": each.version,
                    "digest": each.digest[:12],
                    "rank": each.rank,
                    "bytes": each.nbytes,
                    "pushed": int(each.created),
                    "pinned": each == pinned,
                    "state": moment.states.get(each.id, "disk"),
                    "recent": recent[each.version],
                    "drift": _drift(reports.get(f"v{each.version}")),
                    "golden": self._score(each),
                    "validation": each.checks.get("validation"),
                }
                for each in versions
            ],
        }

    def _score(self, adapter: Adapter) -> Json | None:
        summary = self._golden.results.known(adapter)
        return summary.described() if summary else None
