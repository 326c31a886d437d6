"""What is known about watched versions, for the API and as metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve.drift.features.features import FOLLOW_UP, OUTPUT
from serve.drift.open_alarms import OpenAlarms
from serve.drift.parameter_strata import ParameterStrata
from serve.drift.share_watch import ShareWatch
from serve.drift.signal import Signal
from serve.drift.thinning import ACCEPTED
from serve.drift.watched_version import PROBE, SHARES, WatchedVersion, iso

_LABELS = ("adapter", "version", "signal")
# What is said of requests that ask for something else; it is no signal, and never an alarm.
PARAMETERS = "parameters"
# Above it the mix of parameters is another one.
PARAMETERS_MOVED = 0.2


def version_report(watched: WatchedVersion, now: float, *, examples: bool = True) -> dict[str, Any]:
    """Everything about one version, with examples where they may be quoted."""
    report: dict[str, Any] = {
        "version": watched.version,
        "id": watched.id,
        "baseline": watched.baseline.provenance.origin,
        "in_memory": True,
        "thinning": watched.chosen(),
        "seen_share": None if (share := watched.seen_share()) is None else _rounded(share),
        **{kind: _share_report(share) for kind, share in watched.shares().items()},
        "signals": {kind: _signal_report(watched, kind) for kind in _shown(watched)},
        "alarms": {kind: watched.what_moved(kind) or {} for kind in sorted(watched.alarmed)},
        "parameters": _parameters_report(watched),
    }
    if watched.probe_ratio is not None:
        tolerated = watched.settings.tolerance.probe
        report["probe"] = {"noise_ratio": _rounded(watched.probe_ratio), "tolerance": tolerated}
        report["probe"]["alarms"] = watched.probe_alarms
    if examples and watched.settings.capture:
        report["examples"] = watched.quotes(now)
    return report


def summary_row(version: str, alarmed: Mapping[str, float], moved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One version among many: which signals alarmed, what moved in a sentence each, and since when if known."""
    texts = {kind: moved[kind]["text"] for kind in sorted(alarmed) if "text" in moved.get(kind, {})}
    since = {kind: moved[kind]["since"] for kind in sorted(alarmed) if moved.get(kind, {}).get("since")}
    return {"version": version, "drifted": sorted(alarmed), "moved": texts, "since": since}


def _share_report(watch: ShareWatch) -> dict[str, Any]:
    """The share of requests that thinning accepts, or of accepted ones that carry the opening they used to."""
    return {
        "share": None if watch.share is None else _rounded(watch.share),
        "share_before": None if watch.before is None else _rounded(watch.before),
        "log_evidence": _rounded(watch.log_evidence),
        "alarms": watch.alarms,
        "alarmed": watch.alarmed_at is not None,
        "since": None if watch.alarmed_at is None else iso(watch.alarmed_at),
    }


def _parameters_report(watched: WatchedVersion) -> dict[str, Any]:
    """What requests ask of the sampler, and whether that changed: no drift of the version, whatever its answers do."""
    strata = watched.baseline.strata[OUTPUT]
    moved = strata.moved()
    report: dict[str, Any] = {"moved": _rounded(moved), "shares": strata.shares()}
    report["strata"] = {kind: _strata_report(kind_strata) for kind, kind_strata in watched.baseline.strata.items()}
    if moved > PARAMETERS_MOVED:
        report["note"] = "requests ask for other parameters than the first ones did"
    return report


def _strata_report(strata: ParameterStrata) -> list[dict[str, Any]]:
    """Of each set of parameters: how far its signal is. The first one is what `signals` shows."""
    return [
        {
            **stratum.described(),
            "phase": signal.phase.value,
            "reference_requests": signal.gathered,
            "samples": signal.samples,
            "log_evidence": _rounded(max(signal.log_evidence, 0.0)),
            "alarmed": signal.alarmed,
        }
        for stratum, signal in strata.every()
    ]


def _shown(watched: WatchedVersion) -> list[str]:
    """The signals of a version; that of follow-ups once there are any."""
    signals = watched.baseline.signals
    return [kind for kind in signals if kind != FOLLOW_UP or signals[kind].gathered]


def _signal_report(watched: WatchedVersion, kind: str) -> dict[str, Any]:
    signal = watched.baseline.signals[kind]
    movers = signal.movers() if signal.drifted else []
    return {
        "phase": signal.phase.value,
        "reference_requests": signal.gathered,
        "reference_needed": signal.needed,
        "samples": signal.samples,
        "log_evidence": _rounded(max(signal.log_evidence, 0.0)),
        "log_threshold": _rounded(signal.log_threshold),
        "effects": {name: _rounded(value) for name, value in signal.effects().items()},
        "beyond_tolerance": sorted(signal.beyond()),
        "structure": signal.structure(),
        **({"answers": _answers_report(signal)} if signal.fixed.kinds else {}),
        "alarms": watched.baseline.counts(kind)[1],
        "alarmed": any(each.alarmed for each in watched.baseline.every(kind)),
        "since": watched.since(kind) if signal.drifted or signal.moved() else None,
        "moved": [
            {"score": name, "log_evidence": _rounded(evidence), "rank_shift": _rounded(shift)}
            for name, evidence, shift in movers
        ],
    }


def _answers_report(signal: Signal) -> dict[str, Any]:
    """Of the reference of plain facts that does not learn: how many prompts or answers it holds, and the evidence that
    the facts have left it."""
    evidence = max(signal.fixed.log_evidence, 0.0)
    return {"reference_requests": signal.fixed.gathered, "log_evidence": _rounded(evidence)}


def _numbers(watched: WatchedVersion) -> dict[str, Any]:
    """What a version's series show, unrounded, under the names of its report."""
    numbers: dict[str, Any] = {"signals": {}, "probe": {"alarms": watched.probe_alarms}}
    numbers["thinning"] = watched.chosen()
    numbers["seen_share"] = watched.seen_share()
    numbers |= {kind: {"alarms": share.alarms} for kind, share in watched.shares().items()}
    numbers["parameters"] = {"moved": watched.baseline.strata[OUTPUT].moved()}
    for kind in _shown(watched):
        signal, each = watched.baseline.signals[kind], watched.baseline.every(kind)
        samples, alarms = watched.baseline.counts(kind)
        numbers["signals"][kind] = {
            "reference_requests": signal.gathered,
            "samples": samples,
            "alarms": alarms,
            "log_threshold": signal.log_threshold,
            "log_evidence": max(0.0, *(stratum.log_evidence for stratum in each)),
            "effects": signal.effects() or {"rank_shift": 0.0},
        }
    if watched.probe_ratio is not None:
        numbers["probe"]["noise_ratio"] = watched.probe_ratio
    return numbers


class FalseAlarms:
    """How many false alarms all signals of all versions together are expected to raise, at most.

    While nothing changes, a signal's evidence R less the rows that it has seen is a martingale, which an alarm lowers
    by R >= threshold: so of n rows the mean number of alarms is at most n / threshold, however many versions they
    belong to, whatever the versions have to do with one another, and looked at after every request (Shin, Ramdas and
    Rinaldo, E-detectors, 2022; e-d-Bonferroni of Dandapanthula and Ramdas, Multiple testing in multi-stream
    sequential change detection, 2025). A request is a row of up to three signals.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self.requests = 0
        self.rows = 0

    def count(self, requests: int, rows: int) -> None:
        """So many requests were compared with a reference, as so many rows of signals."""
        self.requests += requests
        self.rows += rows

    @property
    def expected(self) -> float:
        """At most so many since the server started."""
        return self.rows / self._threshold

    @property
    def requests_each(self) -> float:
        """Requests, over all versions, for each expected false alarm, at least. Before the first: three rows each."""
        return self._threshold * self.requests / self.rows if self.rows else self._threshold / 3

    def report(self) -> dict[str, Any]:
        return {
            "expected_at_most": round(self.expected, 6),
            "requests_watched": self.requests,
            "requests_each_at_least": round(self.requests_each),
            "text": f"expected false alarms: at most 1 in {self.requests_each:,.0f} requests over all versions, "
            "as long as requests are exchangeable with their reference",
        }

    def metrics(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "loradock_drift_expected_false_alarms",
            "False alarms that all signals of all versions together are expected to have raised, at most.",
            value=self.expected,
        )
        yield GaugeMetricFamily(
            "loradock_drift_requests_per_false_alarm",
            "Requests over all versions for each expected false alarm, at least.",
            value=self.requests_each,
        )


class _Families:
    """The series of all versions."""

    def __init__(self) -> None:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        self.evidence = gauge(
            "loradock_drift_log_evidence",
            "Natural logarithm of the evidence that the signal has left its reference; 0 while there is none.",
            labels=_LABELS,
        )
        self.threshold = gauge(
            "loradock_drift_threshold_log_evidence",
            "Natural logarithm of the evidence from which on there is an alarm, if an effect goes with it.",
            labels=_LABELS,
        )
        self.effect = gauge(
            "loradock_drift_effect",
            "How far a statistic has moved from the reference: nats for log-probabilities, parts of 1 for ranks and "
            "rates, multiples of its noise for the probe.",
            labels=(*_LABELS, "stat"),
        )
        self.samples = counter(
            "loradock_drift_samples",
            "Requests that were compared with the reference, after thinning; 0 while the reference is gathered.",
            labels=_LABELS,
        )
        self.alarms = counter(
            "loradock_drift_alarms",
            "Alarms of the signal since the version is watched; 0 from its first request on.",
            labels=_LABELS,
        )
        self.alarmed = gauge(
            "loradock_drift_alarmed", "1 from an alarm until somebody acknowledges or accepts it.", labels=_LABELS
        )
        self.thinned = counter(
            "loradock_drift_thinned",
            "Requests that are not compared with the reference, by reason.",
            labels=("adapter", "version", "reason"),
        )
        self.seen = gauge(
            "loradock_drift_seen_share",
            "Share of the requests that are compared with the reference, or gathered for it; why the others are not is "
            "in loradock_drift_thinned_total.",
            labels=("adapter", "version"),
        )
        self.reference = gauge(
            "loradock_drift_reference_requests",
            "Requests in the reference that later ones are compared with; it grows while the reference is gathered.",
            labels=_LABELS,
        )

    def add(self, labels: tuple[str, str], report: Mapping[str, Any], alarmed: Mapping[str, float]) -> None:
        """One version, from its report."""
        for kind, signal in report["signals"].items():
            named = (*labels, kind)
            self.reference.add_metric(named, signal["reference_requests"])
            self.samples.add_metric(named, signal["samples"])
            self.alarms.add_metric(named, signal["alarms"])
            self.threshold.add_metric(named, signal["log_threshold"])
            # Evidence below 1 is none, and ln 0 could not be drawn.
            self.evidence.add_metric(named, signal["log_evidence"] or 0.0)
            for stat, value in signal["effects"].items():
                self.effect.add_metric((*named, stat), value or 0.0)
        self.effect.add_metric((*labels, PARAMETERS, "mix"), report.get("parameters", {}).get("moved") or 0.0)
        probe = report.get("probe", {})
        self.alarms.add_metric((*labels, PROBE), probe.get("alarms", 0))
        if (ratio := probe.get("noise_ratio")) is not None:
            self.effect.add_metric((*labels, PROBE, "noise_ratio"), ratio)
        for kind in SHARES:
            self.alarms.add_metric((*labels, kind), report.get(kind, {}).get("alarms", 0))
        if (share := report.get("seen_share")) is not None:
            self.seen.add_metric(labels, share)
        for reason, count in report.get("thinning", {}).items():
            if reason != ACCEPTED:
                self.thinned.add_metric((*labels, reason), count)
        for kind in {*report["signals"], PROBE, *SHARES, *alarmed}:
            self.alarmed.add_metric((*labels, kind), float(kind in alarmed))

    def __iter__(self) -> Iterator[Metric]:
        return iter(vars(self).values())


def drift_metrics(
    versions: Iterable[WatchedVersion],
    unloaded: Iterable[OpenAlarms],
    label: Callable[[str, str], tuple[str, str]],
) -> tuple[Metric, ...]:
    """The series of all versions that have labels of their own, from their first request on."""
    families = _Families()
    for watched in versions:
        labels = (watched.adapter, watched.version)
        if label(*labels) == labels:
            families.add(labels, _numbers(watched), watched.alarmed)
    for alarms in unloaded:
        labels = (alarms.adapter, alarms.version)
        if label(*labels) == labels:
            families.add(labels, alarms.report, alarms.alarmed)
    return tuple(families)


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
