"""What is known about a watched version, for the API and as metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve.drift.watched_version import PROBE, WatchedVersion

_LABELS = ("adapter", "version", "signal")


def version_report(watched: WatchedVersion, now: float) -> dict[str, Any]:
    """Everything about one version."""
    report: dict[str, Any] = {
        "version": watched.version,
        "id": watched.id,
        "baseline": watched.baseline.provenance.origin,
        "thinning": dict(watched.thinning.counts) if watched.thinning else {},
        "signals": {kind: _signal_report(watched, kind) for kind in watched.baseline.signals},
    }
    if watched.probe_ratio is not None:
        tolerated = watched.settings.tolerance.probe
        report["probe"] = {"noise_ratio": _rounded(watched.probe_ratio), "tolerance": tolerated}
    if watched.settings.capture:
        report["examples"] = watched.quotes(now)
    return report


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
        "alarms": signal.alarms,
        "alarmed": signal.alarmed,
        "since": watched.since(kind) if signal.drifted else None,
        "moved": [
            {"score": name, "log_evidence": _rounded(evidence), "rank_shift": _rounded(shift)}
            for name, evidence, shift in movers
        ],
    }


def drift_metrics(
    versions: Iterable[WatchedVersion], label: Callable[[str, str], tuple[str, str]]
) -> tuple[Metric, ...]:
    """The series of all versions that have labels of their own."""
    evidence = GaugeMetricFamily("loradock_drift_log_evidence", "ln of the evidence that it moved.", labels=_LABELS)
    threshold = GaugeMetricFamily(
        "loradock_drift_threshold_log_evidence", "From here on the evidence is an alarm.", labels=_LABELS
    )
    moved = GaugeMetricFamily(
        "loradock_drift_effect", "How far it moved, in the statistic's unit.", labels=(*_LABELS, "stat")
    )
    samples = CounterMetricFamily("loradock_drift_samples", "Requests looked at, after thinning.", labels=_LABELS)
    alarms = CounterMetricFamily("loradock_drift_alarms", "Alarms.", labels=_LABELS)
    reference = GaugeMetricFamily(
        "loradock_drift_reference_requests", "Requests that later ones are held against.", labels=_LABELS
    )
    for watched in versions:
        labels = (watched.adapter, watched.version)
        if label(*labels) != labels:
            continue
        for kind, signal in watched.baseline.signals.items():
            if not signal.gathered:
                continue
            reference.add_metric((*labels, kind), signal.gathered)
            samples.add_metric((*labels, kind), signal.samples)
            alarms.add_metric((*labels, kind), signal.alarms)
            threshold.add_metric((*labels, kind), signal.log_threshold)
            # Evidence below 1 is none, and ln 0 could not be drawn.
            evidence.add_metric((*labels, kind), max(0.0, signal.log_evidence))
            for stat, value in signal.effects().items():
                moved.add_metric((*labels, kind, stat), value)
        if watched.probe_ratio is not None:
            moved.add_metric((*labels, PROBE, "noise_ratio"), watched.probe_ratio)
            alarms.add_metric((*labels, PROBE), watched.probe_alarms)
    return evidence, threshold, moved, samples, alarms, reference


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
