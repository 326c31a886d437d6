"""One version that is watched: its baseline, the thinning of its traffic, its alarms and quotes."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Exchange, Generation
from serve.drift.baseline import Baseline, Phase, Tolerance
from serve.drift.embedding import Embedding
from serve.drift.features import PROMPT, Answer, Floats, answer_rows, prompt_row
from serve.drift.probe_comparison import ProbeAnswers, has_reference, noise_ratio, probe_arrays
from serve.drift.thinning import Thinning, common_runs
from serve.engine.effect_probe import effect
from serve.names import tenant_of

# The first prompts of a version say which runs of tokens all prompts share: template and system prompt.
EARLY = 32
# Prompts and askers that a version's thinning remembers.
REMEMBERED = 5_000
PROBE = "probe"
QUOTES = 20
QUOTED_CHARACTERS = 400
SAMPLE_TIMES = 4096


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """What an operator sets. `interval` and `quote_seconds` in seconds, `reference` in requests of the prompt signal.

    `capture`: quote answers in reports, with what `redact` matches blacked out. `versions`: kept in memory.
    """

    threshold: float = 1e5
    reference: int = 1000
    interval: float = 600.0
    versions: int = 200
    tolerance: Tolerance = Tolerance()
    capture: bool = False
    redact: tuple[re.Pattern[str], ...] = ()
    quote_seconds: float = 86_400.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something moved, by so much that it matters."""

    adapter: str
    version: str
    signal: str
    effects: Mapping[str, float]
    log_evidence: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`ask_again`: what these answers say may be the noise of a busy engine."""

    alarm: Alarm | None = None
    ask_again: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """What is kept of an exchange: numbers, and a quote if quotes were asked for."""

    began: float
    asker: int | None
    rows: dict[str, Floats]
    quote: dict[str, Any] | None


@dataclass(slots=True, eq=False)
class WatchedVersion:
    """`base` is the name of the base model that the version runs on, `id` the version as the engine knows it."""

    adapter: str
    version: str
    id: str
    base: str
    baseline: Baseline
    settings: DriftSettings
    unsaved: bool = False
    thinning: Thinning[_Sample] | None = None
    # When each signal alarmed last, until it is acknowledged.
    alarmed: dict[str, float] = field(default_factory=dict)
    probe_ratio: float | None = None
    probe_alarms: int = 0
    # When the last samples of each signal came.
    _times: dict[str, deque[float]] = field(init=False, default_factory=dict)
    # The first samples, each with the tokens of its prompt.
    _early: list[tuple[_Sample, NDArray[np.int32]]] = field(init=False, default_factory=list)
    _quotes: deque[tuple[float, dict[str, Any]]] = field(init=False, default_factory=lambda: deque(maxlen=QUOTES))

    def observe(self, exchange: Exchange, embedding: Embedding) -> list[Alarm]:
        """Take in one exchange, unless thinning leaves it out; the alarms that it raised."""
        prompt, asker = exchange.generations[0].prompt, _asker(exchange)
        if self.thinning is not None:
            if not self.thinning.accepts(tokens=prompt, key=asker, now=exchange.began):
                return []
            block = self.thinning.shuffled(self._sample(exchange, embedding))
            return [alarm for sample in block for alarm in self._count(sample)]
        self._early.append((self._sample(exchange, embedding), np.array(prompt, np.int32)))
        if len(self._early) < EARLY:
            return []
        template = common_runs([tokens for _, tokens in self._early])
        settings = self.settings
        self.thinning = Thinning(interval=settings.interval, memory=REMEMBERED, ignore=template, seed=settings.seed)
        early, self._early = self._early, []
        alarms: list[Alarm] = []
        for first, tokens in early:
            for sample in self.thinning.offer(first, tokens=tokens, key=first.asker, now=first.began):
                alarms += self._count(sample)
        return alarms

    def compare_probe(self, answers: ProbeAnswers, now: float, earlier: ProbeAnswers | None = None) -> ProbeResult:
        """Compare the answers to the probe prompts with the first ones, which are kept.

        First answers, and answers that moved, are asked for again and come with the `earlier` ones then. By as much as
        the two differ from one another, rounding differs from batch to batch: that is noise.
        """
        kept, tolerated, noise = self.baseline.probe, self.settings.tolerance.probe, answers.noise
        if earlier is not None:
            noise = max(noise, effect(earlier.version, answers.version))
        if not has_reference(kept, answers):
            if earlier is None:
                return ProbeResult(ask_again=True)
            self.baseline.probe = probe_arrays(answers, noise)
            self.probe_ratio, self.unsaved = 0.0, True
            return ProbeResult()
        ratio = noise_ratio(kept, answers, noise)
        alarmed = self.probe_ratio is not None and self.probe_ratio > tolerated
        if ratio > tolerated and not alarmed and earlier is None:
            return ProbeResult(ask_again=True)
        self.probe_ratio = ratio
        if ratio <= tolerated or alarmed:
            return ProbeResult()
        self.probe_alarms += 1
        self.alarmed[PROBE] = now
        return ProbeResult(Alarm(self.adapter, self.version, PROBE, {"noise_ratio": ratio}, math.inf))

    def acknowledge(self) -> None:
        """The alarms have been dealt with: evidence begins again at nothing."""
        self.alarmed.clear()
        self.unsaved = True
        for signal in self.baseline.signals.values():
            signal.acknowledge()

    def replace_baseline(self, baseline: Baseline) -> None:
        """Compare with this baseline from now on."""
        self.baseline, self.unsaved = baseline, True
        self.alarmed.clear()
        self._times.clear()

    def since(self, kind: str) -> str | None:
        """When the change of a signal began, if it drifted and that is known."""
        signal, times = self.baseline.signals[kind], self._times.get(kind)
        if signal.changed_at is None or not times:
            return None
        back = signal.samples - signal.changed_at
        return _iso(times[-back] if 0 < back <= len(times) else times[0])

    def quotes(self, now: float) -> list[dict[str, Any]]:
        """The answers that may be quoted still."""
        return [quote for when, quote in self._quotes if when > now - self.settings.quote_seconds]

    def _sample(self, exchange: Exchange, embedding: Embedding) -> _Sample:
        generation = exchange.generations[0]
        quote = self._quote(exchange, generation) if self.settings.capture and self._may_quote(exchange) else None
        return _Sample(exchange.began, _asker(exchange), signal_rows(generation, embedding), quote)

    def _count(self, sample: _Sample) -> Iterator[Alarm]:
        """Update every signal with one accepted sample."""
        self.unsaved = True
        if sample.quote is not None:
            self._quotes.append((sample.began, sample.quote))
        for kind, row in sample.rows.items():
            signal = self.baseline.signals[kind]
            if signal.phase is Phase.WATCHING:
                self._times.setdefault(kind, deque(maxlen=SAMPLE_TIMES)).append(sample.began)
            if signal.update(row):
                self.alarmed[kind] = sample.began
                yield Alarm(self.adapter, self.version, kind, signal.beyond(), signal.log_evidence)

    def _may_quote(self, exchange: Exchange) -> bool:
        """Reports on an adapter are its tenant's to read, on a base model the operators'."""
        return self.version == "base" or exchange.tenant == tenant_of(self.adapter)

    def _quote(self, exchange: Exchange, generation: Generation) -> dict[str, Any]:
        text = generation.text[:QUOTED_CHARACTERS]
        for pattern in self.settings.redact:
            text = pattern.sub("[redacted]", text)
        return {"request_id": exchange.request_id, "when": _iso(exchange.began), "answer": text}


def signal_rows(generation: Generation, embedding: Embedding) -> dict[str, Floats]:
    """The row of each signal that one generation gives."""
    row = prompt_row(embedding, generation.prompt)
    answer = Answer(generation.output, generation.finish_reason, generation.text, generation.logprobs)
    return {PROMPT: row, **answer_rows(embedding, row, answer)}


def _asker(exchange: Exchange) -> int | None:
    return None if exchange.asker is None else hash(exchange.asker)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
