"""One version that is watched: its baseline, the thinning of its traffic, its alarms, what moved, and quotes."""

from __future__ import annotations

import math
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Exchange, Generation
from serve.drift.baseline import Baseline, Phase, Tolerance
from serve.drift.change_description import describe, describe_probe, movement
from serve.drift.embedding import Embedding
from serve.drift.features import LOGPROB, OUTPUT, PROMPT, Answer, Floats, answer_rows, prompt_row
from serve.drift.probe_comparison import ProbeAnswers, has_reference, noise_ratio, probe_arrays
from serve.drift.request_text import RequestText
from serve.drift.thinning import Thinning, common_runs
from serve.drift.traffic_profile import Prompt, TrafficProfile
from serve.drift.word_counts import hashed
from serve.engine.effect_probe import effect
from serve.models.language import STOP_WORDS, language_of, words
from serve.names import tenant_of

# The first prompts of a version say which runs of tokens all prompts share: template and system prompt.
EARLY = 32
# Prompts and askers that a version's thinning remembers.
REMEMBERED = 5_000
PROBE = "probe"
# Signals and alarms of the answers' side; every other one is about what is asked.
ANSWERS = frozenset({OUTPUT, LOGPROB, PROBE})
# Requests that may be exported, those of them that a report quotes, and characters of an answer and of a prompt.
EXPORTED, QUOTES = 100, 20
QUOTED_CHARACTERS, PROMPT_CHARACTERS = 400, 2000
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
    """Something moved, by so much that it matters. `moved` says what (`serve.drift.change_description`)."""

    adapter: str
    version: str
    signal: str
    effects: Mapping[str, float]
    log_evidence: float
    moved: Mapping[str, Any] = field(default_factory=dict)


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
    prompt: Prompt


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
    # The tokenizer of its base, to say what moved in words.
    text: RequestText | None = None
    # When each signal alarmed last, and what had moved, until it is acknowledged.
    alarmed: dict[str, float] = field(default_factory=dict)
    moved: dict[str, dict[str, Any]] = field(default_factory=dict)
    # What the reference's requests were about, and what recent ones are.
    reference: TrafficProfile = field(default_factory=TrafficProfile)
    recent: TrafficProfile = field(default_factory=TrafficProfile.of_recent)
    # Requests that were compared with a reference, and their rows: each might be a false alarm.
    requests_watched: int = 0
    rows_watched: int = 0
    probe_ratio: float | None = None
    probe_alarms: int = 0
    # When the last samples of each signal came.
    _times: dict[str, deque[float]] = field(init=False, default_factory=dict)
    # The first samples, each with the tokens of its prompt.
    _early: list[tuple[_Sample, NDArray[np.int32]]] = field(init=False, default_factory=list)
    # When, the prompt's row, and what is quoted.
    _quotes: deque[tuple[float, Floats, dict[str, Any]]] = field(
        init=False, default_factory=lambda: deque(maxlen=EXPORTED)
    )

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
        self.moved[PROBE] = describe_probe(ratio)
        return ProbeResult(
            Alarm(self.adapter, self.version, PROBE, {"noise_ratio": ratio}, math.inf, self.moved[PROBE])
        )

    def acknowledge(self) -> None:
        """The alarms have been dealt with: evidence begins again at nothing, and later alarms are raised again."""
        self.alarmed.clear()
        self.moved.clear()
        self.unsaved = True
        for signal in self.baseline.signals.values():
            signal.acknowledge()

    def accept(self, *, prompts: bool, answers: bool) -> None:
        """What moved is here to stay: recent traffic becomes the reference of the prompts, of the answers, or both."""
        signals, self.unsaved = self.baseline.signals, True
        if prompts:
            changed_at = signals[PROMPT].changed_at
            since = len(self.recent.seen) if changed_at is None else signals[PROMPT].samples - changed_at
            if signals[PROMPT].phase is Phase.WATCHING:
                self.reference, self.recent = self.recent.accepted(since), TrafficProfile.of_recent()
        if answers:
            self.baseline.probe, self.probe_ratio = {}, None
        for kind, signal in signals.items():
            if answers if kind in ANSWERS else prompts:
                signal.accept()
        for kind in [kind for kind in self.alarmed if (answers if kind in ANSWERS else prompts)]:
            del self.alarmed[kind]
            self.moved.pop(kind, None)
        self.baseline.provenance = replace(self.baseline.provenance, origin="accepted")

    def replace_baseline(self, baseline: Baseline) -> None:
        """Compare with this baseline from now on."""
        self.baseline, self.unsaved = baseline, True
        self.alarmed.clear()
        self.moved.clear()
        self.reference, self.recent = TrafficProfile(), TrafficProfile.of_recent()
        self._times.clear()

    def since(self, kind: str) -> str | None:
        """When the change of a signal began, if it drifted and that is known."""
        if kind in self.moved:
            since: str | None = self.moved[kind].get("since")
            return since
        signal, times = self.baseline.signals[kind], self._times.get(kind)
        if signal.changed_at is None or not times:
            return None
        back = signal.samples - signal.changed_at
        return _iso(times[-back] if 0 < back <= len(times) else times[0])

    def what_moved(self, kind: str) -> dict[str, Any] | None:
        """What has moved of a signal that alarmed: as it is now while it is beyond tolerance, else as it was then."""
        signal = self.baseline.signals.get(kind)
        if kind in self.alarmed and signal is not None and signal.alarmed and signal.beyond():
            return describe(signal, self.reference, self.recent, self.since(kind))
        return self.moved.get(kind)

    def quotes(self, now: float) -> list[dict[str, Any]]:
        """The requests that may be quoted still, oldest first."""
        return [quote for when, _, quote in self._quotes if when > now - self.settings.quote_seconds]

    def moved_requests(self, now: float) -> list[dict[str, Any]]:
        """Those of them since the oldest open change began, or all without one; the most moved first.

        `moved` is 0 for a prompt like the reference's, 1 for one like the typical prompt since.
        """
        since = min((when for kind in self.alarmed if (when := self.since(kind))), default="")
        kept = [each for each in self._quotes if each[0] > now - self.settings.quote_seconds and _iso(each[0]) >= since]
        signal = self.baseline.signals[PROMPT]
        rows = [{**quote, "moved": round(movement(signal, row), 3)} for _, row, quote in kept]
        return sorted(rows, key=lambda each: -each["moved"])

    def _sample(self, exchange: Exchange, embedding: Embedding) -> _Sample:
        generation = exchange.generations[0]
        quote = self._quote(exchange, generation) if self.settings.capture and self._may_quote(exchange) else None
        rows = signal_rows(generation, embedding)
        return _Sample(exchange.began, _asker(exchange), rows, quote, self._prompt(exchange, rows[PROMPT][1:]))

    def _prompt(self, exchange: Exchange, vector: Floats) -> Prompt:
        """What a profile takes of a request. Words are the owner's to read, so only the owner's are counted."""
        tokens = exchange.generations[0].prompt
        text = self.text.last(tokens) if self.text is not None else ""
        counted = hashed(words(text), STOP_WORDS) if text and self._may_quote(exchange) else {}
        asker = 0 if exchange.asker is None else zlib.crc32(exchange.asker)
        return Prompt(len(tokens), language_of(text), exchange.tenant, counted, asker, vector)

    def _count(self, sample: _Sample) -> Iterator[Alarm]:
        """Update every signal with one accepted sample."""
        self.unsaved = True
        if sample.quote is not None:
            self._quotes.append((sample.began, sample.rows[PROMPT], sample.quote))
        gathering = self.baseline.signals[PROMPT].phase is Phase.GATHERING
        (self.reference if gathering else self.recent).add(sample.prompt)
        self.requests_watched += any(self.baseline.signals[kind].phase is Phase.WATCHING for kind in sample.rows)
        for kind, row in sample.rows.items():
            signal = self.baseline.signals[kind]
            if signal.phase is Phase.WATCHING:
                self._times.setdefault(kind, deque(maxlen=SAMPLE_TIMES)).append(sample.began)
                self.rows_watched += 1
            if signal.update(row):
                self.moved[kind] = describe(signal, self.reference, self.recent, self.since(kind))
                self.alarmed[kind] = sample.began
                effects, moved = signal.beyond(), self.moved[kind]
                yield Alarm(self.adapter, self.version, kind, effects, signal.log_evidence, moved)

    def _may_quote(self, exchange: Exchange) -> bool:
        """Reports on an adapter are its tenant's to read, on a base model the operators'."""
        return self.version == "base" or exchange.tenant == tenant_of(self.adapter)

    def _quote(self, exchange: Exchange, generation: Generation) -> dict[str, Any]:
        # Redacted before it is cut: half a number would match no pattern.
        answer = self._redacted(generation.text[: 2 * QUOTED_CHARACTERS])[:QUOTED_CHARACTERS]
        quote: dict[str, Any] = {"request_id": exchange.request_id, "when": _iso(exchange.began), "answer": answer}
        if self.text is not None:
            prompt = self.text.last(generation.prompt, PROMPT_CHARACTERS)
            quote["prompt"] = self._redacted(prompt)[-PROMPT_CHARACTERS:]
        return quote

    def _redacted(self, text: str) -> str:
        for pattern in self.settings.redact:
            text = pattern.sub("[redacted]", text)
        return text


def signal_rows(generation: Generation, embedding: Embedding) -> dict[str, Floats]:
    """The row of each signal that one generation gives."""
    row = prompt_row(embedding, generation.prompt)
    answer = Answer(generation.output, generation.finish_reason, generation.text, generation.logprobs)
    return {PROMPT: row, **answer_rows(embedding, row, answer)}


def _asker(exchange: Exchange) -> int | None:
    return None if exchange.asker is None else hash(exchange.asker)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
