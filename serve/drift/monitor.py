"""Watches every version that answers for drift: an observer of the exchange worker.

    exchange > thinning > rows (serve.drift.features) > the version's baseline (serve.drift.baseline) > alarm

Baselines lie in the data directory. They are written every minute and at the end, and read again when needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Exchange
from serve.drift.baseline import NEEDED, Baseline, Provenance
from serve.drift.baseline_files import BaselineFiles, from_zip, to_zip, version_of
from serve.drift.drift_report import drift_metrics, version_report
from serve.drift.embedding import Embedding
from serve.drift.features import PROMPT
from serve.drift.probe_comparison import ProbeAnswers
from serve.drift.watched_version import Alarm, DriftSettings, ProbeResult, WatchedVersion, signal_rows
from serve.errors import ConfigError

log = logging.getLogger(__name__)

# Baselines written at a time: a thousand at once would keep the disk busy for long.
SAVED_AT_ONCE = 50


class DriftMonitor(Collector):
    """May be called from any thread but the event loop's. `on_alarm` is called in the worker's thread.

    `base_of` says which base an adapter runs on. `label` gives a version's metric labels, which may be `other`.
    """

    def __init__(
        self,
        folder: Path,
        settings: DriftSettings = DriftSettings(),
        *,
        base_of: Callable[[str], str] = lambda adapter: "",
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
        label: Callable[[str, str], tuple[str, str]] = lambda adapter, version: (adapter, version),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = BaselineFiles(folder)
        self._settings = settings
        self._base_of, self._on_alarm, self._label, self._clock = base_of, on_alarm, label, clock
        scale = settings.reference / NEEDED[PROMPT]
        self._needed = {kind: max(20, round(count * scale)) for kind, count in NEEDED.items()}
        # Embedding and tokenizer digest by the base's name.
        self._models: dict[str, tuple[Embedding, str]] = {}
        # Held for one exchange by the worker, for one look by a scrape or a report; never by the event loop.
        self._lock = threading.Lock()
        # In order of last use, oldest first.
        self._versions: OrderedDict[str, WatchedVersion] = OrderedDict()

    # Observer of the exchange worker

    def start(self) -> None:
        """Nothing is read ahead: a baseline is read with its version's first request."""

    def observe(self, exchange: Exchange) -> None:
        """Take in an exchange that was answered by a version of a watched base."""
        if exchange.status != 200 or not exchange.generations or exchange.version == "":
            return
        generation = exchange.generations[0]
        if not generation.prompt or not generation.output or generation.finish_reason in ("abort", "error"):
            return
        base = self._base_of(exchange.adapter)
        with self._lock:
            if base not in self._models:
                return
            watched = self._watched(exchange.adapter, exchange.version, exchange.id, base)
            alarms = watched.observe(exchange, self._models[base][0])
        for alarm in alarms:
            self._on_alarm(alarm)

    def save(self) -> None:
        """Write some of the baselines that changed."""
        self._save(SAVED_AT_ONCE)

    def stop(self) -> None:
        """Write all baselines that changed."""
        self._save(None)

    def _save(self, at_most: int | None) -> None:
        with self._lock:
            unsaved = [watched for watched in self._versions.values() if watched.unsaved][:at_most]
        for watched in unsaved:
            with self._lock:
                watched.unsaved = False
                self._files.save(watched.baseline, watched.id)

    # Bases

    def learn(self, base: str, embedding: Embedding, tokenizer: str = "") -> None:
        """Watch the versions of a base from now on; `tokenizer` is a digest."""
        with self._lock:
            known = self._models.get(base)
            if known and (known[0].digest, known[1]) == (embedding.digest, tokenizer):
                return
            self._models[base] = embedding, tokenizer
            self._unload(base)

    def pause(self, base: str) -> None:
        """Another model is behind this base: its versions are not watched until it is learned."""
        with self._lock:
            if self._models.pop(base, None):
                self._unload(base)

    def watches(self, base: str) -> bool:
        """Whether the versions of this base are watched."""
        return base in self._models

    def _unload(self, base: str) -> None:
        for key in [key for key, watched in self._versions.items() if watched.base == base]:
            watched = self._versions.pop(key)
            self._files.save(watched.baseline, watched.id)

    # One version

    def compare_probe(
        self,
        adapter: str,
        version: str,
        id: str,
        answers: ProbeAnswers,
        earlier: ProbeAnswers | None = None,
    ) -> ProbeResult:
        """Compare what a version answered to the probe prompts with its first answers to them."""
        base = self._base_of(adapter)
        with self._lock:
            if base not in self._models:
                return ProbeResult()
            watched = self._watched(adapter, version, id, base)
            return watched.compare_probe(answers, self._clock(), earlier)

    def acknowledge(self, adapter: str, version: str) -> None:
        """The alarms of a version have been dealt with: its evidence begins again."""
        with self._lock:
            for watched in self._versions.values():
                if (watched.adapter, watched.version) == (adapter, version):
                    watched.acknowledge()

    def forget(self, adapter: str, id: str) -> None:
        """A version was removed: remove all that is known about it."""
        with self._lock:
            self._versions.pop(id, None)
            self._files.remove(adapter, id)

    def build_baseline(self, adapter: str, version: str, id: str, exchanges: Sequence[Exchange]) -> dict[str, int]:
        """Make a version's baseline of these exchanges, not of its first traffic; returns the rows of each signal."""
        base = self._base_of(adapter)
        with self._lock:
            provenance = self._provenance(adapter, id, base)
            embedding, _ = self._models[base]
        rows: dict[str, list[Any]] = {}
        for exchange in exchanges:
            for generation in exchange.generations[:1]:
                for kind, row in signal_rows(generation, embedding).items():
                    rows.setdefault(kind, []).append(row)
        baseline = Baseline.build(provenance, rows)
        baseline.configure(threshold=self._settings.threshold, tolerance=self._settings.tolerance)
        with self._lock:
            self._watched(adapter, version, id, base).replace_baseline(baseline)
        return {kind: len(signal) for kind, signal in rows.items()}

    def export_baseline(self, adapter: str, version: str, id: str) -> bytes:
        """A version's baseline as a zip, for another server over the same model."""
        base = self._base_of(adapter)
        with self._lock:
            if base not in self._models:
                raise ConfigError("drift is not watched on this server, so it has no baselines")
            return to_zip(self._watched(adapter, version, id, base).baseline)

    def import_baseline(self, adapter: str, version: str, id: str, data: bytes) -> dict[str, int]:
        """Compare a version with the baseline in such a zip; ConfigError when it is damaged or not this version's."""
        base = self._base_of(adapter)
        with self._lock:
            provenance = self._provenance(adapter, id, base)
        baseline = from_zip(data, provenance, self._settings.tolerance)
        self._configure(baseline)
        with self._lock:
            self._watched(adapter, version, id, base).replace_baseline(baseline)
        return {kind: signal.gathered for kind, signal in baseline.signals.items()}

    # Reports

    def report(self, adapter: str) -> list[dict[str, Any]]:
        """Everything about each watched version of an adapter, for the API."""
        with self._lock:
            versions = [watched for watched in self._versions.values() if watched.adapter == adapter]
            return [version_report(watched, self._clock()) for watched in versions]

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        """By adapter, each version's signals with alarms."""
        by_adapter: dict[str, list[dict[str, Any]]] = {}
        with self._lock:
            for watched in self._versions.values():
                row = {"version": watched.version, "drifted": sorted(watched.alarmed)}
                by_adapter.setdefault(watched.adapter, []).append(row)
        return by_adapter

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            families = drift_metrics(self._versions.values(), self._label)
        yield from families

    # Baselines in memory

    def _watched(self, adapter: str, version: str, id: str, base: str) -> WatchedVersion:
        """The watched version, loaded or begun if need be; the least recently used one is unloaded."""
        key = id or adapter
        watched = self._versions.get(key)
        if watched is None:
            baseline = self._baseline(adapter, id, base)
            self._configure(baseline)
            watched = WatchedVersion(adapter, version, id, base, baseline, self._settings)
            self._versions[key] = watched
        watched.version = version
        self._versions.move_to_end(key)
        if len(self._versions) > self._settings.versions:
            _, oldest = self._versions.popitem(last=False)
            self._files.save(oldest.baseline, oldest.id)
        return watched

    def _baseline(self, adapter: str, id: str, base: str) -> Baseline:
        provenance = self._provenance(adapter, id, base)
        if saved := self._files.load(provenance, id, self._settings.tolerance):
            return saved
        # The prompts are the same, whichever version answers them.
        siblings = [other for other in self._versions.values() if other.adapter == adapter and other.id != id]
        for sibling in reversed(siblings):
            try:
                return sibling.baseline.successor(provenance)
            except ConfigError as error:
                log.warning("%s does not inherit the prompts of %s: %s", id, sibling.id, error.message)
        return Baseline(provenance)

    def _configure(self, baseline: Baseline) -> None:
        settings = self._settings
        baseline.configure(threshold=settings.threshold, tolerance=settings.tolerance, needed=self._needed)

    def _provenance(self, adapter: str, id: str, base: str) -> Provenance:
        if base not in self._models:
            raise ConfigError("drift is not watched on this server, so a version cannot be compared with a baseline")
        embedding, tokenizer = self._models[base]
        dimensions = embedding.table.shape[1]
        return Provenance(
            adapter, version_of(id), embedding.digest, tokenizer, seed=self._settings.seed, dimensions=dimensions
        )
