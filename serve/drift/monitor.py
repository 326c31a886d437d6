"""Looks at what went by, in a thread of its own behind a bounded queue: drift of every version, and canaries on trial.

    exchange > thinning > rows (serve.drift.features) > the version's baseline (serve.drift.baseline)
             > trial (serve.rollout.canary), if it was dealt to a canary or to the version it is held against

The event loop offers and never waits: what comes while the queue is full is dropped and counted. Baselines lie in the
data directory; they are written every minute and at the end, and come back at the start.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import queue
import random
import re
import shutil
import threading
import time
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Exchange, Generation
from serve.drift.baseline import MAX_BYTES, NEEDED, Baseline, Phase, Provenance, Tolerance
from serve.drift.embedding import Embedding
from serve.drift.features import PROMPT, Answer, answer_rows, prompt_row
from serve.drift.thinning import Thinning, common_runs
from serve.engine.effect_probe import Logprobs, effect
from serve.errors import ConfigError
from serve.files import write_whole
from serve.rollout.canary import CanaryTrial, CanaryTrials, Judgement

log = logging.getLogger(__name__)

QUEUE = 2000
SAVE_SECONDS = 60.0
# Baselines that one saving writes: a thousand at once would keep the disk busy for long.
SAVES = 50
# So many first prompts say what all prompts share: template and system prompt.
EARLY = 32
# Prompts and askers that a version's thinning remembers.
REMEMBERED = 5_000
PROBE = "probe"
# What the base's own answers differ by from batch to batch, in nats, where the engine was not measured to do more.
PROBE_NOISE = 0.04
QUOTES = 20
QUOTED = 400
TIMES = 4096
# Seconds for which it is decided at once whether log-probabilities are looked at.
SLOT = 2.0
_BASELINE_FILE = re.compile(r"baseline\.json|baseline-[0-9a-f]{64}\.npz")

Labels = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something moved, by so much that it matters."""

    adapter: str
    version: str
    signal: str
    effects: Mapping[str, float]
    log_evidence: float


@dataclass(slots=True, eq=False)
class Watched:
    """One version: its baseline, and who was already counted."""

    adapter: str
    version: str
    id: str
    baseline: Baseline
    early: list[tuple[Exchange, Generation]] = field(default_factory=list)
    thinning: Thinning[Exchange] | None = None
    dirty: bool = False
    # When the last samples of each signal came.
    times: dict[str, deque[float]] = field(default_factory=dict)
    alarmed: dict[str, float] = field(default_factory=dict)
    probe_ratio: float | None = None
    probe_alarms: int = 0
    quotes: deque[tuple[float, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=QUOTES))


class Watcher(Collector):
    """`offer`, `wants_logprobs` and `rated` belong to the event loop; the rest may be called from any thread.

    `alarmed` and `judged` are called in the worker's thread. `base_of` says which base an adapter belongs to.
    """

    def __init__(
        self,
        folder: Path,
        trials: CanaryTrials,
        *,
        threshold: float = 1e5,
        reference: int = 1000,
        interval: float = 600.0,
        logprobs: float = 0.05,
        versions: int = 200,
        tolerance: Tolerance = Tolerance(),
        capture: bool = False,
        redact: Sequence[str] = (),
        keep_quotes: float = 86_400.0,
        base_of: Callable[[str], str] = lambda adapter: "",
        label: Callable[[str, str], Labels] = lambda adapter, version: (adapter, version),
        alarmed: Callable[[Alarm], None] = lambda alarm: None,
        judged: Callable[[Judgement], None] = lambda judgement: None,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._trials = trials
        self._threshold, self._tolerance, self._interval = threshold, tolerance, interval
        scale = reference / NEEDED[PROMPT]
        self._needed = {kind: max(20, round(count * scale)) for kind, count in NEEDED.items()}
        self._share, self._most = logprobs, versions
        self._capture, self._keep_quotes = capture, keep_quotes
        self._redact = [re.compile(pattern) for pattern in redact]
        self._label, self._alarmed, self._judged = label, alarmed, judged
        self._seed, self._clock = seed, clock
        # By the base's name.
        self._base_of = base_of
        self._bases: dict[str, tuple[Embedding, str]] = {}
        self._queue: queue.Queue[Exchange | tuple[Any, ...] | None] = queue.Queue(QUEUE)
        self._thread: threading.Thread | None = None
        # The worker holds it for one exchange, a scrape and a report for one look; the event loop never.
        self._lock = threading.Lock()
        # In order of last use, oldest first.
        self._versions: OrderedDict[str, Watched] = OrderedDict()
        self._closely: frozenset[str] = frozenset()
        self._lots = random.Random(seed)
        self._slot, self._sampled = -1, False
        self.dropped = 0
        self._spent, self._taken = 0.0, 0

    # The event loop's side

    def offer(self, exchange: Exchange) -> None:
        """Have an exchange looked at, or drop it if there are too many."""
        if self._thread is not None:
            self._put(exchange)

    def wants_logprobs(self, adapter: str) -> bool:
        """Whether this request is one whose log-probabilities are looked at: all of a canary's trial, some of others.

        Decided before anybody knows who answers, so that both sides of a trial are looked at alike; and for all that
        come within the same two seconds together. A step of the engine costs more as soon as one request in its batch
        has them: of 16 streams sampled one by one, 5 % would be in more than half of all steps.
        """
        if self._thread is None:
            return False
        slot = int(self._clock() / SLOT)
        if slot != self._slot:
            self._slot, self._sampled = slot, self._lots.random() < self._share
        return self._sampled or adapter in self._closely

    def rated(self, adapter: str, version: str, rating: float, asker: bytes | None) -> None:
        """Have feedback about a dealt request counted in the trial."""
        if self._thread is not None:
            self._put(("rated", adapter, version, rating, asker))

    # The worker's side

    def learn(self, base: str, embedding: Embedding, tokenizer: str = "") -> None:
        """The model of a base, now or from now on; `tokenizer` is a digest. Nothing that came before is looked at."""
        with self._lock:
            known = self._bases.get(base)
            if known and (known[0].digest, known[1]) == (embedding.digest, tokenizer):
                return
            self._bases[base] = embedding, tokenizer
            for key in [key for key, one in self._versions.items() if self._base_of(one.adapter) == base]:
                self._write(self._versions.pop(key))
        if self._thread is None:
            self._start()

    def pause(self, base: str) -> None:
        """Another model is behind this base: nothing of it is looked at until it is learned."""
        with self._lock:
            if self._bases.pop(base, None):
                for key in [key for key, one in self._versions.items() if self._base_of(one.adapter) == base]:
                    self._write(self._versions.pop(key))

    def _start(self) -> None:
        self._restore_trials()
        self._thread = threading.Thread(target=self._work, name="watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look at what waits, write what is new, and end."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        thread.join()
        self.save()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def settle(self) -> None:
        """Returns when everything that was offered so far has been looked at."""
        self._queue.join()

    def save(self, most: int | None = None) -> None:
        """Write the baselines that changed, at most so many, and the trials."""
        with self._lock:
            dirty = [one for one in self._versions.values() if one.dirty][:most]
        for one in dirty:
            with self._lock:
                one.dirty = False
                self._write(one)
        with self._lock:
            states = [trial.state() for trial in self._trials.running.values()]
        self._write_trials(states)

    def _put(self, what: Exchange | tuple[Any, ...]) -> None:
        try:
            self._queue.put_nowait(what)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        due = time.monotonic() + SAVE_SECONDS
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                item = ()
            try:
                if item is None:
                    return
                if item:
                    self._look(item)
                if time.monotonic() >= due:
                    due = time.monotonic() + SAVE_SECONDS
                    self.save(SAVES)
            except Exception:  # one odd request must not end the watch over all others
                log.exception("a request was not looked at")
            finally:
                if item != ():
                    self._queue.task_done()

    def _look(self, item: Exchange | tuple[Any, ...]) -> None:
        began = time.thread_time()
        judgement: Judgement | None
        alarms: list[Alarm] = []
        with self._lock:
            if isinstance(item, tuple):
                judgement = self._trials.rated(*item[1:])
            else:
                judgement = self._trials.observe(item)
                alarms = self._watch(item)
            self._closely = frozenset(name for name, trial in self._trials.running.items() if trial.closely)
            self._spent += time.thread_time() - began
            self._taken += 1
        for alarm in alarms:
            self._alarmed(alarm)
        if judgement is not None:
            self._judged(judgement)

    def _watch(self, exchange: Exchange) -> list[Alarm]:
        if exchange.status != 200 or not exchange.generations or exchange.version == "":
            return []
        if self._base_of(exchange.adapter) not in self._bases:
            return []
        generation = exchange.generations[0]
        if not generation.prompt or not generation.output or generation.finish_reason in ("abort", "error"):
            return []
        watched = self._of(exchange.adapter, exchange.version, exchange.id)
        if watched.thinning is None:
            watched.early.append((exchange, generation))
            if len(watched.early) < EARLY:
                return []
            runs = common_runs([one.prompt for _, one in watched.early])
            watched.thinning = Thinning(interval=self._interval, memory=REMEMBERED, ignore=runs, seed=self._seed)
            early, watched.early = watched.early, []
        else:
            early = [(exchange, generation)]
        alarms: list[Alarm] = []
        for one, made in early:
            key = None if one.asker is None else hash(one.asker)
            for accepted in watched.thinning.offer(one, tokens=made.prompt, key=key, now=one.began):
                alarms += self._sample(watched, accepted)
        return alarms

    def _sample(self, watched: Watched, exchange: Exchange) -> Iterator[Alarm]:
        """One accepted request into the version's signals."""
        embedding, _ = self._bases[self._base_of(watched.adapter)]
        generation = exchange.generations[0]
        row = prompt_row(embedding, generation.prompt)
        answer = Answer(generation.output, generation.finish_reason, generation.text, generation.logprobs)
        watched.dirty = True
        if self._capture:
            watched.quotes.append((exchange.began, self._quote(exchange, generation)))
        for kind, values in {PROMPT: row, **answer_rows(embedding, row, answer)}.items():
            signal = watched.baseline.signals[kind]
            if signal.phase is Phase.WATCHING:
                watched.times.setdefault(kind, deque(maxlen=TIMES)).append(exchange.began)
            if signal.update(values):
                watched.alarmed[kind] = exchange.began
                yield Alarm(watched.adapter, watched.version, kind, signal.beyond(), signal.log_evidence)

    def _quote(self, exchange: Exchange, generation: Generation) -> dict[str, Any]:
        text = generation.text[:QUOTED]
        for pattern in self._redact:
            text = pattern.sub("[redacted]", text)
        return {"request_id": exchange.request_id, "when": _when(exchange.began), "answer": text}

    # The probe

    def probed(self, adapter: str, version: str, id: str, found: Sequence[Logprobs], noise: float) -> Alarm | None:
        """What a version answered to the fixed prompts: its first answer is kept, later ones are held against it."""
        if self._base_of(adapter) not in self._bases or not found:
            return None
        with self._lock:
            watched = self._of(adapter, version, id)
            kept = watched.baseline.probe
            if "logprobs" not in kept or len(kept["logprobs"]) != len(found):
                watched.baseline.probe = _packed(found, max(noise, PROBE_NOISE))
                watched.probe_ratio, watched.dirty = 0.0, True
                return None
            moved = effect(_unpacked(kept), found)
            before, watched.probe_ratio = watched.probe_ratio, moved / float(kept["noise"])
            limit = self._tolerance.probe
            if watched.probe_ratio <= limit or (before is not None and before > limit):
                return None
            watched.probe_alarms += 1
            watched.alarmed[PROBE] = self._clock()
            return Alarm(adapter, version, PROBE, {"noise_ratio": watched.probe_ratio}, math.inf)

    def acknowledge(self, adapter: str, version: str) -> None:
        """Alarms of a version have been dealt with: its evidence begins again."""
        with self._lock:
            for one in self._versions.values():
                if (one.adapter, one.version) == (adapter, version):
                    one.alarmed.clear()
                    one.dirty = True
                    for signal in one.baseline.signals.values():
                        signal.acknowledge()

    def forget(self, adapter: str, id: str) -> None:
        """A version is gone, and what was known of it goes too."""
        with self._lock:
            self._versions.pop(id, None)
            place = self._place(adapter, id)
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):
                place.parent.rmdir()

    def adopt(self, adapter: str, version: str, id: str, exchanges: Sequence[Exchange]) -> dict[str, int]:
        """Make a version's baseline of these exchanges, instead of its first traffic; how many rows each signal got."""
        if self._base_of(adapter) not in self._bases:
            raise ConfigError("drift is not watched on this server, so there is nothing to build a baseline for")
        embedding, _ = self._bases[self._base_of(adapter)]
        rows: dict[str, list[Any]] = {}
        for exchange in exchanges:
            for made in exchange.generations[:1]:
                row = prompt_row(embedding, made.prompt)
                answer = Answer(made.output, made.finish_reason, made.text, made.logprobs)
                for kind, values in {PROMPT: row, **answer_rows(embedding, row, answer)}.items():
                    rows.setdefault(kind, []).append(values)
        baseline = Baseline.build(self._provenance(adapter, id), rows)
        baseline.configure(threshold=self._threshold, tolerance=self._tolerance)
        with self._lock:
            watched = self._of(adapter, version, id)
            watched.baseline, watched.dirty = baseline, True
            watched.alarmed.clear()
            watched.times.clear()
        return {kind: len(those) for kind, those in rows.items()}

    def packed(self, adapter: str, version: str, id: str) -> bytes:
        """A version's baseline as a zip of its two files, for another server over the same model."""
        with self._lock:
            if self._base_of(adapter) not in self._bases:
                raise ConfigError("drift is not watched on this server, so it has no baselines")
            watched = self._of(adapter, version, id)
            with TemporaryDirectory() as folder:
                watched.baseline.save(Path(folder))
                out = io.BytesIO()
                with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
                    for file in sorted(Path(folder).iterdir()):
                        archive.write(file, file.name)
                return out.getvalue()

    def unpack(self, adapter: str, version: str, id: str, data: bytes) -> dict[str, int]:
        """Hold a version against the baseline in such a zip; ConfigError when it is damaged or not this version's."""
        if self._base_of(adapter) not in self._bases:
            raise ConfigError("drift is not watched on this server, so there is nothing to hold against a baseline")
        with TemporaryDirectory() as folder:
            try:
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    members = [one for one in archive.infolist() if _BASELINE_FILE.fullmatch(one.filename)]
                    if sum(one.file_size for one in members) > MAX_BYTES or len(members) != 2:
                        raise ConfigError("this is no baseline: `loradock baseline save` writes a zip of two files")
                    for one in members:
                        (Path(folder) / one.filename).write_bytes(archive.read(one))
            except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as damaged:
                raise ConfigError(f"the baseline is not a zip file that can be read: {damaged}") from damaged
            baseline = Baseline.load(Path(folder), self._provenance(adapter, id), tolerance=self._tolerance)
        baseline.configure(threshold=self._threshold, tolerance=self._tolerance, needed=self._needed)
        with self._lock:
            watched = self._of(adapter, version, id)
            watched.baseline, watched.dirty = baseline, True
            watched.alarmed.clear()
            watched.times.clear()
        return {kind: signal.gathered for kind, signal in baseline.signals.items()}

    # What there is to see

    def report(self, adapter: str) -> dict[str, Any]:
        """Everything about an adapter, in words and numbers for the API."""
        with self._lock:
            versions = [self._reported(one) for one in self._versions.values() if one.adapter == adapter]
            trial = self._trials.running.get(adapter)
            return {"versions": versions, "canary": trial.report() if trial else None}

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        """By adapter, each version's signals with alarms."""
        with self._lock:
            found: dict[str, list[dict[str, Any]]] = {}
            for one in self._versions.values():
                moved = sorted(one.alarmed)
                found.setdefault(one.adapter, []).append({"version": one.version, "drifted": moved})
            return found

    def collect(self) -> Iterator[Metric]:
        labels = ("adapter", "version", "signal")
        evidence = GaugeMetricFamily("loradock_drift_log_evidence", "ln of the evidence that it moved.", labels=labels)
        threshold = GaugeMetricFamily(
            "loradock_drift_threshold_log_evidence", "From here on the evidence is an alarm.", labels=labels
        )
        moved = GaugeMetricFamily(
            "loradock_drift_effect", "How far it moved, in the statistic's unit.", labels=(*labels, "stat")
        )
        samples = CounterMetricFamily("loradock_drift_samples", "Requests looked at, after thinning.", labels=labels)
        alarms = CounterMetricFamily("loradock_drift_alarms", "Alarms.", labels=labels)
        reference = GaugeMetricFamily(
            "loradock_drift_reference_requests", "Requests that later ones are held against.", labels=labels
        )
        checks = GaugeMetricFamily(
            "loradock_swap_log_evidence",
            "ln of the evidence that the canary does worse than the live version.",
            labels=("adapter", "version", "check"),
        )
        with self._lock:
            for one in self._versions.values():
                named = self._label(one.adapter, one.version)
                if named != (one.adapter, one.version):
                    continue
                for kind, signal in one.baseline.signals.items():
                    if not signal.gathered:
                        continue
                    reference.add_metric((*named, kind), signal.gathered)
                    samples.add_metric((*named, kind), signal.samples)
                    alarms.add_metric((*named, kind), signal.alarms)
                    threshold.add_metric((*named, kind), signal.log_threshold)
                    # Evidence below 1 is none; ln of nothing would be no number to draw.
                    evidence.add_metric((*named, kind), max(0.0, signal.log_evidence))
                    for stat, value in signal.effects().items():
                        moved.add_metric((*named, kind, stat), value)
                if one.probe_ratio is not None:
                    moved.add_metric((*named, PROBE, "noise_ratio"), one.probe_ratio)
                    alarms.add_metric((*named, PROBE), one.probe_alarms)
            for adapter, trial in self._trials.running.items():
                named = self._label(adapter, f"v{trial.canary}")
                for group, value in trial.evidence().items():
                    checks.add_metric((*named, group), max(value, -20.0))
        yield from (evidence, threshold, moved, samples, alarms, reference, checks)
        yield CounterMetricFamily(
            "loradock_tap_dropped", "Exchanges that the watcher was too busy to look at.", value=self.dropped
        )
        cost = CounterMetricFamily("loradock_watcher_seconds", "CPU time of the watcher's thread.")
        cost.add_metric((), self._spent)
        yield cost
        yield CounterMetricFamily("loradock_watcher_requests", "Requests the watcher looked at.", value=self._taken)

    def _reported(self, one: Watched) -> dict[str, Any]:
        counts = dict(one.thinning.counts) if one.thinning else {}
        signals: dict[str, Any] = {}
        told: dict[str, Any] = {
            "version": one.version,
            "id": one.id,
            "baseline": one.baseline.provenance.origin,
            "thinning": counts,
            "signals": signals,
        }
        for kind, signal in one.baseline.signals.items():
            row: dict[str, Any] = {
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
                "since": None,
                "moved": [],
            }
            signals[kind] = row
            if signal.drifted:
                row["since"] = self._since(one, kind, signal.samples, signal.changed_at)
                row["moved"] = [
                    {"score": name, "log_evidence": _rounded(value), "rank_shift": _rounded(shift)}
                    for name, value, shift in signal.movers()
                ]
        if one.probe_ratio is not None:
            told["probe"] = {"noise_ratio": _rounded(one.probe_ratio), "tolerance": self._tolerance.probe}
        if self._capture:
            since = self._clock() - self._keep_quotes
            told["examples"] = [quote for when, quote in one.quotes if when > since]
        return told

    def _since(self, one: Watched, kind: str, samples: int, changed_at: int | None) -> str | None:
        times = one.times.get(kind)
        if changed_at is None or not times:
            return None
        back = samples - changed_at
        return _when(times[-back] if 0 < back <= len(times) else times[0])

    # Versions and files

    def _of(self, adapter: str, version: str, id: str) -> Watched:
        """The watched version, read from the disk or begun if need be; the longest unused gives way."""
        key = id or adapter
        watched = self._versions.get(key)
        if watched is None:
            watched = self._versions[key] = Watched(adapter, version, id, self._read(adapter, id))
            watched.baseline.configure(threshold=self._threshold, tolerance=self._tolerance, needed=self._needed)
        watched.version = version
        self._versions.move_to_end(key)
        if len(self._versions) > self._most:
            _, oldest = self._versions.popitem(last=False)
            self._write(oldest)
        return watched

    def _read(self, adapter: str, id: str) -> Baseline:
        mine = self._provenance(adapter, id)
        folder = self._place(adapter, id)
        if (folder / "baseline.json").exists():
            try:
                return Baseline.load(folder, mine, tolerance=self._tolerance)
            except ConfigError as error:
                log.warning("%s begins a new baseline: %s", id or adapter, error.message)
        # The prompts are the same, whichever version answers them.
        before = [one for one in self._versions.values() if one.adapter == adapter and one.id != id]
        for one in reversed(before):
            try:
                return one.baseline.successor(mine)
            except ConfigError as error:
                log.warning("%s does not inherit the prompts of %s: %s", id, one.id, error.message)
        return Baseline(mine)

    def _provenance(self, adapter: str, id: str) -> Provenance:
        version = id.partition("@")[2] or "base"
        embedding, tokenizer = self._bases[self._base_of(adapter)]
        dimensions = embedding.table.shape[1]
        return Provenance(adapter, version, embedding.digest, tokenizer, seed=self._seed, dimensions=dimensions)

    def _write(self, one: Watched) -> None:
        try:
            one.baseline.save(self._place(one.adapter, one.id))
        except OSError as error:
            log.error("the baseline of %s was not written: %s", one.id or one.adapter, error.strerror)

    def _place(self, adapter: str, id: str) -> Path:
        # Names may hold a slash, and the base's whatever a model is called: neither is a path here.
        name = base64.urlsafe_b64encode(adapter.encode()).decode().rstrip("=")
        return self._folder / name / (id.partition("@")[2] or "base")

    def _write_trials(self, states: Sequence[Mapping[str, NDArray]]) -> None:
        packed = io.BytesIO()
        arrays = {f"{i}/{name}": value for i, state in enumerate(states) for name, value in state.items()}
        np.savez(packed, allow_pickle=False, **arrays)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / "trials.npz", packed.getvalue())
        except OSError as error:
            log.error("the trials were not written: %s", error.strerror)

    def _restore_trials(self) -> None:
        file = self._folder / "trials.npz"
        if not file.exists():
            return
        try:
            with np.load(file, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in loaded.files}
            for i in {name.partition("/")[0] for name in arrays}:
                state = {name.partition("/")[2]: value for name, value in arrays.items() if name.startswith(f"{i}/")}
                trial = CanaryTrial.from_state(state)
                self._trials.running[trial.adapter] = trial
        except (OSError, ValueError, KeyError) as error:
            log.warning("canaries are held against the live version from the beginning: %s", error)


def _packed(found: Sequence[Logprobs], noise: float) -> dict[str, NDArray]:
    most = min(len(one) for one in found)
    rows = [sorted(one.items(), key=lambda pair: -pair[1])[:most] for one in found]
    return {
        "tokens": np.array([[token for token, _ in row] for row in rows], np.int64),
        "logprobs": np.array([[value for _, value in row] for row in rows], np.float64),
        "noise": np.array(noise),
    }


def _unpacked(kept: Mapping[str, NDArray]) -> list[Logprobs]:
    pairs = zip(kept["tokens"].tolist(), kept["logprobs"].tolist(), strict=True)
    return [dict(zip(tokens, values, strict=True)) for tokens, values in pairs]


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
