"""Watches every version that answers for drift: an observer of the exchange worker.

    exchange > thinning > rows (serve.drift.features.features) > the version's baseline (serve.drift.baseline) > alarm

Baselines lie in the data directory. They are written every minute and at the end, and read again when needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Exchange
from serve.drift.baseline import NEEDED, Baseline, Provenance
from serve.drift.baseline_files import BaselineFiles, from_zip, to_zip, version_of
from serve.drift.drift_report import FalseAlarms, drift_metrics, summary_row, version_report
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import FOLLOW_UP, LOGPROB, PROMPT, PROMPTS
from serve.drift.features.last_turn import last_turn
from serve.drift.features.request_rows import reference_rows
from serve.drift.features.traffic_profile import TrafficProfiles
from serve.drift.open_alarms import OpenAlarms, UnloadedAlarms
from serve.drift.parameter_strata import most_common
from serve.drift.probe_comparison import ProbeAnswers
from serve.drift.reference_counts import ReferenceCounts
from serve.drift.watched_version import PROBE, DriftSettings, ProbeResult, WatchedVersion
from serve.errors import ConfigError
from serve.events import DriftAlarm, Events
from serve.models.request_text import RequestText
from serve.names import MIXED

log = logging.getLogger(__name__)

# Baselines written at a time: a thousand at once would keep the disk busy for long.
SAVED_AT_ONCE = 50
# What a version's requests were about, beside its baseline.
PROFILE = "profile.json"
# Seconds without a request after which nobody waits for a version's log-probabilities.
LATELY = 600.0


class Watching(Protocol):
    """What the monitor asks of policies."""

    def watches(self, adapter: str, tenant: str) -> bool:
        """Whether the requests of this tenant say anything of this adapter."""

    def routes(self, adapter: str) -> bool:
        """Whether requests are routed to this adapter by what it is asked."""


class DriftMonitor(Collector):
    """May be called from any thread but the event loop's. Alarms are published from the worker's thread.

    `base_of` says which base an adapter runs on. `label` gives a version's metric labels, which may be `other`.
    `exists(adapter, id)`: whether there still is this version. `policies` say whose requests are compared.
    """

    def __init__(
        self,
        folder: Path,
        settings: DriftSettings = DriftSettings(),
        *,
        base_of: Callable[[str], str] = lambda adapter: "",
        events: Events | None = None,
        label: Callable[[str, str], tuple[str, str]] = lambda adapter, version: (adapter, version),
        exists: Callable[[str, str], bool] = lambda adapter, id: True,
        policies: Watching | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = BaselineFiles(folder)
        self.kept = self._files.kept
        self.fits = ReferenceCounts(self._look)
        self._unloaded = UnloadedAlarms(self._files, exists)
        self._false_alarms = FalseAlarms(settings.threshold)
        self._settings = settings
        self._base_of = base_of
        self._events = events or Events()
        self._policies = policies
        self._label = label
        self._clock = clock
        scale = settings.reference / NEEDED[PROMPT]
        self._needed = {kind: max(20, round(count * scale)) for kind, count in NEEDED.items()}
        # Embedding and tokenizer digest by the base's name.
        self._models: dict[str, tuple[Embedding, str]] = {}
        self._texts: dict[str, RequestText] = {}
        # Held for one exchange by the worker, for one look by a scrape or a report; never by the event loop.
        self._lock = threading.Lock()
        # Adapters by the id of a version that has no reference of log-probabilities yet, and when it was last asked.
        self._lacking_ids: dict[str, tuple[str, float]] = {}
        self._lacking: frozenset[str] = frozenset()
        # In order of last use, oldest first.
        self._versions: OrderedDict[str, WatchedVersion] = OrderedDict()
        # When the last request came of those with requests that are not compared yet; and alarms to tell of.
        self._gathered: dict[WatchedVersion, float] = {}
        self._raised: list[DriftAlarm] = []

    # Observer of the exchange worker

    def start(self) -> None:
        """Read which alarms are open. A baseline is read with its version's first request."""
        self._unloaded.read()
        self._files.count()

    def observe(self, exchange: Exchange) -> None:
        """Take in an exchange that was answered by a version of a watched base; `looked` compares it."""
        if exchange.status != 200 or not exchange.generations or exchange.version in ("", MIXED):
            return
        if exchange.id and self._policies and not self._policies.watches(exchange.adapter, exchange.tenant):
            return
        generation = exchange.generations[0]
        if not generation.prompt or not generation.output or generation.finish_reason in ("abort", "error"):
            return
        base = self._base_of(exchange.adapter)
        with self._lock:
            if base not in self._models:
                return
            watched = self._watched(exchange.adapter, exchange.version, exchange.id, base)
            self._gathered[watched] = exchange.began
            self._note_alarms(watched, watched.gather(exchange, self._models[base][0]))

    def looked(self) -> None:
        """Compare what was taken in with the references, and tell of alarms."""
        with self._lock:
            gathered = list(self._gathered)
        for watched in gathered:
            try:
                with self._lock:
                    self._count(watched)
            except Exception:  # a version's own: the others are compared all the same
                log.exception("requests of %s were not compared", watched.id or watched.adapter)
            time.sleep(0)  # whoever waits for the interpreter has it first
        raised, self._raised = self._raised, []
        for alarm in raised:
            self._events.publish(alarm)

    def _count(self, watched: WatchedVersion) -> None:
        """Compare what was taken in of a version."""
        began = self._gathered.pop(watched, None)
        if began is None:
            return
        requests, rows = watched.requests_watched, watched.rows_watched
        alarms = watched.count()
        self._false_alarms.count(watched.requests_watched - requests, watched.rows_watched - rows)
        self._note_fit(watched)
        self._note_logprobs(watched, began)
        self._note_alarms(watched, alarms)

    def _note_alarms(self, watched: WatchedVersion, alarms: Sequence[DriftAlarm]) -> None:
        if alarms:  # also a kill does not lose them
            self._raised += alarms
            self._store(watched)

    def lacks_logprobs(self, adapter: str) -> bool:
        """Whether a version of this adapter still gathers its reference of log-probabilities; for any thread."""
        return adapter in self._lacking

    def _note_logprobs(self, watched: WatchedVersion, now: float) -> None:
        """Keep in mind which adapters need log-probabilities: those with a version that has been asked lately and has
        no reference yet. The set is replaced, so that other threads read it whole."""
        key, lacking = watched.id or watched.adapter, self._lacking_ids
        changed = (lacking.pop(key, None) is None) != watched.baseline.signals[LOGPROB].watching
        if not watched.baseline.signals[LOGPROB].watching:
            lacking[key] = watched.adapter, now  # the last one: who was asked longest ago stands first
        while lacking and now - next(iter(lacking.values()))[1] >= LATELY:
            del lacking[next(iter(lacking))]
            changed = True
        if changed:
            self._lacking = frozenset(adapter for adapter, _ in lacking.values())

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
            try:
                with self._lock:
                    self._store(watched)
            except Exception:  # a disk's, or a version's own: what stands behind it is written all the same
                log.exception("what is known of %s is not saved", watched.id)

    def _store(self, watched: WatchedVersion) -> OpenAlarms:
        """Write all that is kept of a version."""
        self._count(watched)
        watched.unsaved = False
        self._files.save(watched.baseline, watched.id)
        profile = watched.profiles[PROMPT].state() | {FOLLOW_UP: watched.profiles[FOLLOW_UP].state()}
        self._files.save_notes(watched.adapter, watched.id, PROFILE, profile)
        # Quotes are not written to the disk.
        report = {**version_report(watched, self._clock(), examples=False), "in_memory": False}
        names = (watched.adapter, watched.version, watched.id, watched.base)
        alarms = OpenAlarms(*names, dict(watched.alarmed), dict(watched.moved), report)
        self._unloaded.write(alarms)
        return alarms

    # Bases

    def learn(self, base: str, embedding: Embedding, tokenizer: str = "", text: RequestText | None = None) -> None:
        """Watch the versions of a base from now on; `tokenizer` is a digest, `text` decodes prompts."""
        with self._lock:
            known = self._models.get(base)
            if known and (known[0].digest, known[1]) == (embedding.digest, tokenizer):
                return
            self._models[base] = embedding, tokenizer
            self._unload(base)
            self._texts.pop(base, None)
            if text is not None:
                self._texts[base] = text

    def pause(self, base: str) -> None:
        """Another model is behind this base: its versions are not watched until it is learned."""
        with self._lock:
            if self._models.pop(base, None):
                self._unload(base)

    def watches(self, base: str) -> bool:
        """Whether the versions of this base are watched."""
        return base in self._models

    def _look(self, adapter: str, version: str, id: str) -> bool:
        """Note what is kept of a version's reference; whether there is one."""
        with self._lock:
            watched = self._known(adapter, version, id) if self._base_of(adapter) in self._models else None
            return watched is not None and self._note_fit(watched)

    def _note_fit(self, watched: WatchedVersion) -> bool:
        """Whether requests may be routed to its adapter, or to a base, and there is a reference to go by."""
        routes = self._policies is not None and (not watched.id or self._policies.routes(watched.adapter))
        return routes and self.fits.note(watched)

    def _unload(self, base: str) -> None:
        self.fits.drop(base)
        for key in [key for key, watched in self._versions.items() if watched.base == base]:
            self._unloaded.unloaded(self._store(self._versions.pop(key)))

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
            result = watched.compare_probe(answers, self._clock(), earlier)
            if result.alarm:
                self._store(watched)
            return result

    def acknowledge(self, adapter: str, version: str, id: str) -> None:
        """The alarms of a version have been dealt with: its evidence begins again."""
        with self._lock:
            if watched := self._known(adapter, version, id):
                watched.acknowledge()
                self._store(watched)

    def accept(self, adapter: str, version: str, id: str, *, prompts: bool, answers: bool) -> None:
        """Make a version's recent traffic the reference of its prompts, its answers, or both."""
        with self._lock:
            watched = self._known(adapter, version, id)
            if watched is None:
                raise ConfigError(f"nothing is known of the traffic of {adapter}@{version} yet, so there is no change")
            watched.accept(prompts=prompts, answers=answers)
            self._store(watched)

    def begin_prompts_anew(self, adapter: str, version: str, id: str) -> None:
        """A version was made for what is asked now: its own prompts are the reference, and not its predecessor's."""
        base = self._base_of(adapter)
        with self._lock:
            if base in self._models:
                watched = self._watched(adapter, version, id, base)
                watched.accept(prompts=True, answers=False)
                self._store(watched)

    def moved_requests(self, adapter: str, id: str) -> list[dict[str, Any]]:
        """The captured requests of a version since its oldest open change began, the most moved first."""
        with self._lock:
            watched = self._versions.get(id or adapter)
            return watched.moved_requests(self._clock()) if watched else []

    def _known(self, adapter: str, version: str, id: str) -> WatchedVersion | None:
        """The watched version if it is in memory or on the disk."""
        base = self._base_of(adapter)
        if (id or adapter) not in self._versions and not self._files.has(adapter, id):
            return None
        return self._watched(adapter, version, id, base)

    def forget(self, adapter: str, id: str) -> None:
        """A version was removed: remove all that is known about it."""
        with self._lock:
            if gone := self._versions.pop(id, None):
                self._gathered.pop(gone, None)
            self._unloaded.forget(adapter, id)
            self._lacking_ids.pop(id, None)
            self.fits.forget(id)
            self._files.remove(adapter, id)

    def build_baseline(self, adapter: str, version: str, id: str, exchanges: Sequence[Exchange]) -> dict[str, int]:
        """Make a version's baseline of these exchanges, not of its first traffic; returns the rows of each signal."""
        base = self._base_of(adapter)
        with self._lock:
            provenance = self._provenance(adapter, id, base)
            embedding, _ = self._models[base]
        generations = [exchange.generations[0] for exchange in exchanges if exchange.generations]
        stratum = most_common(generation.parameters for generation in generations)
        text = self._texts.get(base)
        prompts = [
            last_turn(exchange.question, exchange.generations[0].prompt, text).tokens
            for exchange in exchanges
            if exchange.generations
        ]
        rows = reference_rows(generations, prompts, embedding, stratum.tokens)
        baseline = Baseline.build(provenance, rows)
        for kind, strata in baseline.strata.items():
            if kind in rows:
                strata.built(stratum)
        baseline.configure(threshold=self._settings.threshold, tolerance=self._settings.tolerance)
        self._replace(adapter, version, id, baseline)
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
        self._replace(adapter, version, id, baseline)
        signals = baseline.signals.items()
        return {kind: signal.gathered for kind, signal in signals if kind != FOLLOW_UP or signal.gathered}

    def _replace(self, adapter: str, version: str, id: str, baseline: Baseline) -> None:
        with self._lock:
            watched = self._watched(adapter, version, id, self._base_of(adapter))
            watched.replace_baseline(baseline)
            self._note_fit(watched)

    # Reports

    def report(self, adapter: str) -> list[dict[str, Any]]:
        """Everything about each watched version of an adapter, for the API, and of others with open alarms."""
        unloaded = [alarms.report for alarms in self._unloaded if alarms.adapter == adapter]
        with self._lock:
            versions = [watched for watched in self._versions.values() if watched.adapter == adapter]
            return unloaded + [version_report(watched, self._clock()) for watched in versions]

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        """By adapter, each version's signals with alarms."""
        by_adapter: dict[str, list[dict[str, Any]]] = {}
        for alarms in self._unloaded:
            row = summary_row(alarms.version, alarms.alarmed, alarms.moved)
            by_adapter.setdefault(alarms.adapter, []).append(row)
        with self._lock:
            for watched in self._versions.values():
                row = summary_row(watched.version, watched.alarmed, watched.moved)
                by_adapter.setdefault(watched.adapter, []).append(row)
        return by_adapter

    def false_alarms(self) -> dict[str, Any]:
        """How many false alarms all versions together are expected to raise, at most."""
        return self._false_alarms.report()

    def collect(self) -> Iterator[Metric]:
        unloaded = list(self._unloaded)
        with self._lock:
            families = drift_metrics(self._versions.values(), unloaded, self._label)
        yield from families
        yield from self._false_alarms.metrics()

    # Baselines in memory

    def _watched(self, adapter: str, version: str, id: str, base: str) -> WatchedVersion:
        """The watched version, loaded or begun if need be; the least recently used one is unloaded."""
        key = id or adapter
        watched = self._versions.get(key)
        if watched is None:
            watched = self._loaded(adapter, version, id, base)
            self._configure(watched.baseline)
            self._versions[key] = watched
        watched.version = version
        self._versions.move_to_end(key)
        if len(self._versions) > self._settings.versions:
            key, oldest = self._versions.popitem(last=False)
            self._lacking_ids.pop(key, None)
            self._unloaded.unloaded(self._store(oldest))
        return watched

    def _loaded(self, adapter: str, version: str, id: str, base: str) -> WatchedVersion:
        """A version as it was saved, or one that begins now."""
        provenance = self._provenance(adapter, id, base)
        known: dict[str, Any] = {"text": self._texts.get(base), "numbers": self._models[base][0].numbers}
        if saved := self._files.load(provenance, id, self._settings.tolerance):
            watched = WatchedVersion(adapter, version, id, base, saved, self._settings, **known)
            self._restore(watched)
            return watched
        # The prompts are the same, whichever version answers them.
        siblings = [other for other in self._versions.values() if other.adapter == adapter and other.id != id]
        for sibling in reversed(siblings):
            try:
                baseline = sibling.baseline.successor(provenance)
            except ConfigError as error:
                log.warning("%s does not inherit the prompts of %s: %s", id, sibling.id, error.message)
                continue
            watched = WatchedVersion(adapter, version, id, base, baseline, self._settings, **known)
            for kind in PROMPTS:
                watched.profiles[kind].inherit(sibling.profiles[kind])
            return watched
        return WatchedVersion(adapter, version, id, base, Baseline(provenance), self._settings, **known)

    def _restore(self, watched: WatchedVersion) -> None:
        """What lies beside a version's baseline: open alarms, and what its requests were about."""
        if alarms := self._unloaded.loaded(watched.adapter, watched.id):
            watched.alarmed, watched.moved = dict(alarms.alarmed), dict(alarms.moved)
            if PROBE in alarms.alarmed:
                probe = alarms.report.get("probe", {})
                watched.probe_ratio, watched.probe_alarms = probe.get("noise_ratio"), probe.get("alarms", 0)
        for kind, signal in watched.baseline.signals.items():
            if signal.alarmed:  # before this was kept
                watched.alarmed.setdefault(kind, self._clock())
        profile = self._files.notes(watched.adapter, watched.id, PROFILE)
        try:
            if profile:
                watched.profiles[PROMPT] = TrafficProfiles.from_state(profile)
                if FOLLOW_UP in profile:  # earlier releases did not watch them
                    watched.profiles[FOLLOW_UP] = TrafficProfiles.from_state(profile[FOLLOW_UP])
        except (KeyError, TypeError, ValueError) as error:
            log.warning("what %s was asked before is not known any more: %s", watched.id or watched.adapter, error)

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
