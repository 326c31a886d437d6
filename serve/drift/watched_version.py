"""One version that is watched: its baseline, the thinning of its traffic, its alarms, what moved, and quotes."""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections import deque
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.asgi.exchange import Exchange, Generation
from serve.drift.answer_facts import (
    Facts,
    answer_facts,
    asks_json,
    block_facts,
    first_hits,
    other_language,
    spoken,
)
from serve.drift.baseline import Baseline, Phase, Tolerance
from serve.drift.change_description import clearer, describe, describe_probe, movement
from serve.drift.conversation_blocks import ConversationBlocks
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import (
    ALL_TOKENS,
    FOLLOW_UP,
    LOGPROB,
    OUTPUT,
    PROMPT,
    PROMPTS,
    SIGNALS,
    WHOLE_PROMPTS,
    Floats,
    answer_rows,
    beginning,
    prompt_row,
)
from serve.drift.features.last_turn import Turn, last_turn
from serve.drift.features.request_rows import follow_up_row, regress_on
from serve.drift.features.shared_ends import skipped
from serve.drift.features.traffic_profile import Prompt, TrafficProfiles
from serve.drift.features.word_counts import hashed
from serve.drift.parameter_strata import LEGACY, Stratum
from serve.drift.probe_comparison import ProbeAnswers, has_reference, noise_ratio, probe_arrays
from serve.drift.prompt_facts import prompt_facts
from serve.drift.share_watch import ShareWatch
from serve.drift.signal import Signal
from serve.drift.state_arrays import below, prefixed
from serve.drift.thinning import (
    ACCEPTED,
    CROWDED,
    NEAR,
    REPEATED,
    WARMING_UP,
    WINDOW,
    Taken,
    Thinning,
)
from serve.engine.effect_probe import effect
from serve.events import DriftAlarm
from serve.models.language import STOP_WORDS, language_of, read
from serve.models.request_text import TAIL, RequestText
from serve.models.text_marks import marks_of
from serve.names import tenant_of

PROBE = "probe"
# What is said of the sampling itself: much less is accepted than before, and prompts open otherwise than before.
SAMPLING, OPENING = SHARES = ("sampling", "opening")
# What most requests do when `sampling` alarms, by why they are left out.
LEFT_OUT = {
    REPEATED: "repeat earlier prompts",
    NEAR: "are nearly the same as earlier ones",
    CROWDED: "come from askers who asked a moment ago",
    "": "are left out",
}
# Signals and alarms of the answers' side; every other one is about what is asked.
ANSWERS = frozenset({OUTPUT, LOGPROB, PROBE})
# Requests that may be exported, those of them that a report quotes, and characters of an answer and of a prompt.
EXPORTED, QUOTES = 100, 20
QUOTED_CHARACTERS, PROMPT_CHARACTERS = 400, 2000
SAMPLE_TIMES = 4096
# Requests that are counted in one piece: the interpreter is held for a part of that time.
COUNTED_AT_ONCE = 64
# Signals whose times are kept until those that are gone are forgotten.
MOST_SIGNALS = 16


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
class ProbeResult:
    """`ask_again`: what these answers say may be the noise of a busy engine."""

    alarm: DriftAlarm | None = None
    ask_again: bool = False


class _Quote(NamedTuple):
    """What is quoted of a request; it becomes text when somebody reads it."""

    request_id: str
    began: float
    answer: str
    prompt: array[int]

    @classmethod
    def of(cls, exchange: Exchange, generation: Generation) -> _Quote:
        # No token is shorter than a character.
        prompt = array("i", generation.prompt[-PROMPT_CHARACTERS:])
        return cls(exchange.request_id, exchange.began, generation.text[: 2 * QUOTED_CHARACTERS], prompt)


@dataclass(slots=True, eq=False)
class _Sample:
    """What is kept of an exchange: numbers, and a quote if quotes were asked for. `skipped`: tokens of its prompt that
    are not looked at. `rows` are of as much of the answer as its `stratum` looks at, `lower_rows` of the beginning that
    `lower` looks at."""

    began: float
    rows: dict[str, Floats]
    tenant: str
    asker: int | None
    # Whether words of its prompt may be counted.
    words: bool
    # Whether its prompt was chosen by the reference of prompts, so that it says nothing of that.
    routed: bool
    stratum: Stratum
    # What is plain about its answer.
    facts: dict[str, float | None]
    # It goes on with a conversation: a block of messages, or the answer to one.
    later: bool
    quote: _Quote | None = None
    skipped: int = 0
    # Once it is accepted.
    prompt: Prompt | None = None
    lower: Stratum = LEGACY
    lower_rows: dict[str, Floats] = field(default_factory=dict)
    # The answer's language.
    spoken: str = ""


class _Message(NamedTuple):
    """What is kept of a message of a conversation and of its answer; `tokens` of one that goes on with it."""

    began: float
    tenant: str
    asker: int | None
    words: bool
    routed: bool
    tokens: NDArray[np.int64]
    stratum: Stratum
    facts: dict[str, float | None]

    def sample(self, facts: dict[str, float | None], *, later: bool = True, **rows: Floats) -> _Sample:
        """Of it, or of the block that it ends."""
        names = self.tenant, self.asker, self.words, self.routed
        return _Sample(self.began, rows, *names, self.stratum, facts, later)


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
    # Which tokens are made of digits (`Embedding.numbers`).
    numbers: NDArray[np.bool_] | None = None
    # The tokenizer of its base, to say what moved in words.
    text: RequestText | None = None
    thinning: Thinning[_Sample] = field(init=False)
    # When each signal alarmed last, and what had moved, until it is acknowledged.
    alarmed: dict[str, float] = field(default_factory=dict)
    moved: dict[str, dict[str, Any]] = field(default_factory=dict)
    # What the requests of each signal of prompts were about, and what recent ones are.
    profiles: dict[str, TrafficProfiles] = field(
        default_factory=lambda: {kind: TrafficProfiles() for kind in sorted(PROMPTS)}
    )
    # Requests that were compared with a reference, and their rows: each might be a false alarm.
    requests_watched: int = 0
    rows_watched: int = 0
    probe_ratio: float | None = None
    probe_alarms: int = 0
    # When the last samples of each signal came.
    _times: dict[Signal, deque[float]] = field(init=False, default_factory=dict)
    # Messages that go on with a conversation.
    follow_ups: ConversationBlocks[_Message] = field(init=False, default_factory=ConversationBlocks)
    # Accepted, but not counted yet.
    _gathered: list[_Sample] = field(init=False, default_factory=list)
    # The prompt's row, and what is quoted.
    _quotes: deque[tuple[Floats, _Quote]] = field(init=False, default_factory=lambda: deque(maxlen=EXPORTED))

    def __post_init__(self) -> None:
        self.thinning = Thinning(interval=self.settings.interval, warm_up=WINDOW, numbers=self.numbers)
        if remembered := self.baseline.sampling():
            self.thinning.restore(remembered)
            self.follow_ups.restore(below(remembered, "follow_ups."))
        self.baseline.sampling = self._sampling
        self.alarmed |= {
            kind: share.alarmed_at for kind, share in self.shares().items() if share.alarmed_at is not None
        }

    def gather(self, exchange: Exchange, embedding: Embedding) -> list[DriftAlarm]:
        """Take in one exchange; the alarms about the sampling that it raised. If thinning accepts it, it counts with
        one of the next `count`s."""
        self.unsaved = True
        prompt, asker = exchange.generations[0].prompt, _asker(exchange)
        turn = last_turn(exchange.question, prompt, self.text)
        message = self._message(exchange, turn, asker)
        for block in self.follow_ups.offer(message, turn, asker):
            self._gathered.append(self._follow_up(block, embedding))
        if self.whole_prompts:
            self._offer(self._sample(exchange, prompt, message, embedding), prompt, None, embedding)
        elif not turn.follows:
            self._offer(self._sample(exchange, turn.tokens, message, embedding), turn.tokens, turn.system, embedding)
        elif block := self.follow_ups.joined:
            self._gathered.append(block[-1].sample(first_hits([each.facts for each in block])))
        return list(self._sampling_alarms())

    @property
    def whole_prompts(self) -> bool:
        """Its reference is one of whole rendered prompts, and not of last messages: an earlier release made it."""
        return self.baseline.provenance.features <= WHOLE_PROMPTS

    def _sampling(self) -> dict[str, NDArray]:
        """What the choice of requests remembers."""
        return self.thinning.state() | prefixed(self.follow_ups.state(), "follow_ups.")

    def chosen(self) -> dict[str, int]:
        """How many requests are compared, and how many are not, by reason."""
        counts = dict(self.thinning.counts)
        if not self.whole_prompts:
            for reason, count in self.follow_ups.counts.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    def seen_share(self) -> float | None:
        """The share of the requests that are compared, since it is settled which are; None before."""
        counts = self.chosen()
        requests = sum(counts.values()) - counts[WARMING_UP]
        return counts[ACCEPTED] / requests if requests else None

    def _offer(
        self, sample: _Sample, prompt: ArrayLike, opening: NDArray[np.uint64] | None, embedding: Embedding
    ) -> None:
        taken = self.thinning.offer(sample, tokens=prompt, key=sample.asker, now=sample.began, opening=opening)
        if taken is not None:
            self._gathered.append(self._accepted(taken, embedding))

    def count(self) -> list[DriftAlarm]:
        """Compare what was gathered with the reference, in its order; the alarms that it raised. Many requests at once
        cost less than as many one after another, and say the same."""
        alarms: list[DriftAlarm] = []
        while self._gathered:
            samples, self._gathered = self._gathered[:COUNTED_AT_ONCE], self._gathered[COUNTED_AT_ONCE:]
            alarms += self._count(samples)
        return alarms

    def compare_probe(self, answers: ProbeAnswers, now: float, earlier: ProbeAnswers | None = None) -> ProbeResult:
        """Compare the answers to the probe prompts with the first ones, which are kept.

        First answers, and answers that moved, are asked for again and come with the `earlier` ones then. By as much as
        the two differ from one another, rounding differs from batch to batch: that is noise.
        """
        kept = self.baseline.probe
        tolerated = self.settings.tolerance.probe
        noise = answers.noise
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
            DriftAlarm(self.adapter, self.version, PROBE, {"noise_ratio": ratio}, math.inf, self.moved[PROBE])
        )

    def acknowledge(self) -> None:
        """The alarms have been dealt with: evidence begins again at nothing, and later alarms are raised again."""
        self.alarmed.clear()
        self.moved.clear()
        self.unsaved = True
        for kind in self.baseline.signals:
            for signal in self.baseline.every(kind):
                signal.acknowledge()
        self.thinning.acknowledge()

    def accept(self, *, prompts: bool, answers: bool) -> None:
        """What moved is here to stay: recent traffic becomes the reference of the prompts, of the answers, or both."""
        signals, self.unsaved = self.baseline.signals, True
        if prompts:
            self.thinning.acknowledge()
            for kind, profiles in self.profiles.items():
                changed_at = signals[kind].changed_at
                since = len(profiles.recent.seen) if changed_at is None else signals[kind].samples - changed_at
                if signals[kind].phase is Phase.WATCHING:
                    profiles.accept(since)
        if answers:
            self.baseline.probe, self.probe_ratio = {}, None
        for kind in signals:
            if answers if kind in ANSWERS else prompts:
                for signal in self.baseline.every(kind):
                    signal.accept()
        for kind in [kind for kind in self.alarmed if (answers if kind in ANSWERS else prompts)]:
            del self.alarmed[kind]
            self.moved.pop(kind, None)
        self.baseline.provenance = replace(self.baseline.provenance, origin="accepted")

    def replace_baseline(self, baseline: Baseline) -> None:
        """Compare with this baseline from now on. The traffic is the same: what its thinning remembers stays."""
        self.thinning.acknowledge()
        baseline.sampling = self._sampling
        self.baseline, self.unsaved = baseline, True
        self.alarmed.clear()
        self.moved.clear()
        self.profiles = {kind: TrafficProfiles() for kind in self.profiles}
        self._times.clear()

    def since(self, kind: str) -> str | None:
        """When the change of a signal began, if it drifted and that is known."""
        if kind in self.moved:
            since: str | None = self.moved[kind].get("since")
            return since
        signal = self.baseline.signals.get(kind)
        return None if signal is None else self._since(signal)

    def _since(self, signal: Signal) -> str | None:
        if moved := signal.moved():
            return iso(moved[0].since)
        times = self._times.get(signal)
        if signal.changed_at is None or not times:
            return None
        back = signal.samples - signal.changed_at
        return iso(times[-back] if 0 < back <= len(times) else times[0])

    def what_moved(self, kind: str) -> dict[str, Any] | None:
        """What has moved of a signal that alarmed: as it is now while it is beyond tolerance and has a name, else as
        it was then."""
        signal = self.baseline.signals.get(kind)
        if kind in self.alarmed and signal is not None and signal.alarmed and signal.beyond():
            return clearer(self.moved.get(kind), describe(signal, self._profiles(kind), self.since(kind)))
        return self.moved.get(kind)

    def _profiles(self, kind: str) -> TrafficProfiles:
        """What the requests of a signal were about; those of answers were about their prompts."""
        return self.profiles.get(kind, self.profiles[PROMPT])

    def quotes(self, now: float) -> list[dict[str, Any]]:
        """The latest requests that may be quoted still, oldest first."""
        latest = islice(self._quotes, max(0, len(self._quotes) - QUOTES), None)
        return [self._quoted(quote) for _, quote in latest if quote.began > now - self.settings.quote_seconds]

    def moved_requests(self, now: float) -> list[dict[str, Any]]:
        """Those of them since the oldest open change began, or all without one; the most moved first.

        `moved` is 0 for a prompt like the reference's, 1 for one like the typical prompt since.
        """
        since = min((when for kind in self.alarmed if (when := self.since(kind))), default="")
        oldest, signal = now - self.settings.quote_seconds, self.baseline.signals[PROMPT]
        rows = [
            {**self._quoted(quote), "moved": round(movement(signal, row), 3)}
            for row, quote in self._quotes
            if quote.began > oldest and iso(quote.began) >= since
        ]
        return sorted(rows, key=lambda each: -each["moved"])

    def shares(self) -> dict[str, ShareWatch]:
        """What is watched of the sampling itself, by the name of its alarm."""
        return {SAMPLING: self.thinning.acceptance, OPENING: self.thinning.opening.share}

    def _sampling_alarms(self) -> Iterator[DriftAlarm]:
        for kind, share in self.shares().items():
            if share.alarmed_at is not None and kind not in self.alarmed:
                self.alarmed[kind] = share.alarmed_at
                effects = {"share": share.share or 0.0, "share_before": share.before or 0.0}
                shares = f"{effects['share']:.0%} now, {effects['share_before']:.0%} before"
                text = {
                    SAMPLING: f"most requests {LEFT_OUT[self.thinning.left_out]}: {shares} are compared",
                    OPENING: "the opening that prompts share (a system prompt, template or examples) changed: "
                    f"{shares} carry the one from before",
                }[kind]
                since = iso(share.alarmed_at)
                self.moved[kind] = {"text": f"at {since}, {text}", "since": since, **effects}
                yield DriftAlarm(self.adapter, self.version, kind, effects, share.log_evidence, self.moved[kind])

    def _sample(self, exchange: Exchange, prompt: Sized, message: _Message, embedding: Embedding) -> _Sample:
        generation = exchange.generations[0]
        stratum, *below = self.baseline.strata[OUTPUT].levels(message.stratum)
        sample = message.sample(
            message.facts, later=False, **answer_rows(embedding, beginning(generation, stratum.tokens))
        )
        if below:
            sample.lower = below[0]
            sample.lower_rows = answer_rows(embedding, beginning(generation, below[0].tokens))
        if self.settings.capture and message.words:
            sample.quote = _Quote.of(exchange, generation)
        sample.skipped, sample.spoken = skipped(prompt), spoken(generation.text)
        return sample

    def _accepted(self, taken: Taken[_Sample], embedding: Embedding) -> _Sample:
        """The sample of an accepted request, with all that is made of its prompt."""
        sample, all_tokens = taken.item, self.baseline.provenance.features == ALL_TOKENS
        tokens = taken.tokens if all_tokens else taken.own
        whole_row = prompt_row(embedding, tokens, sample.skipped)
        sample.rows[PROMPT], row = whole_row, whole_row[: 1 + embedding.dimensions]
        for rows in (sample.rows, sample.lower_rows):
            regress_on(row, rows)
        rest = 2 * len(tokens) < len(taken.tokens)
        sample.prompt = self._described(sample, tokens, len(tokens) + sample.skipped, row[1:], rest=rest)
        sample.facts |= other_language(sample.spoken, sample.prompt.language)
        return sample

    def _described(
        self, sample: _Sample, tokens: NDArray[np.integer], length: int, vector: Floats, *, rest: bool = False
    ) -> Prompt:
        # Words are the owner's to read, so only the owner's are counted.
        text = self.text.last(tokens[-TAIL:].tolist()) if self.text is not None else ""
        language, words = read(text)
        counted = hashed(words, STOP_WORDS) if words and sample.words else {}
        return Prompt(length, language, sample.tenant, counted, sample.asker or 0, vector, marks_of(text, rest=rest))

    def _message(self, exchange: Exchange, turn: Turn, asker: int | None) -> _Message:
        generation, tokens = exchange.generations[0], np.zeros(0, np.int64)
        stratum = Stratum.of(generation.parameters)
        facts = answer_facts(generation, stratum.tokens, asks_json=asks_json(exchange.question))
        if turn.follows and not turn.repeats:
            tokens = turn.tokens
            text = self.text.last(tokens[-TAIL:].tolist()) if self.text is not None else ""
            facts |= other_language(spoken(generation.text), language_of(text))
        # Reports on an adapter are its tenant's to read, on a base model the operators'.
        owned = self.version == "base" or exchange.tenant == tenant_of(self.adapter)
        names = exchange.tenant, asker, owned, exchange.routed
        return _Message(exchange.began, *names, tokens, stratum, facts)

    def _follow_up(self, block: Sequence[_Message], embedding: Embedding) -> _Sample:
        """The sample of a block of messages that go on with one conversation."""
        last = block[-1]
        row = follow_up_row(embedding, [message.tokens for message in block])
        same = [message.facts for message in block if message.stratum == last.stratum]
        sample = last.sample(block_facts(same), **{FOLLOW_UP: row})
        mean = sum(len(message.tokens) for message in block) // len(block)
        sample.prompt = self._described(sample, last.tokens, mean, row[1 : 1 + embedding.dimensions])
        return sample

    def _count(self, samples: Sequence[_Sample]) -> Iterator[DriftAlarm]:
        """Update every signal with some accepted samples, one after another."""
        taken = [list(self._taken(sample)) for sample in samples]
        rows: dict[Signal, list[Floats]] = {}
        for _, signal, row in chain.from_iterable(taken):
            rows.setdefault(signal, []).append(row)
        steps = {signal: signal.steps(each) for signal, each in rows.items()}
        facts = [list(self._facts(sample)) for sample in samples]
        fact_steps = _fact_steps(samples, facts)
        for sample, signals, known in zip(samples, taken, facts, strict=True):
            if sample.quote is not None:
                self._quotes.append((sample.rows[PROMPT], sample.quote))
            if sample.prompt is not None and not sample.routed:
                kind = FOLLOW_UP if FOLLOW_UP in sample.rows else PROMPT
                gathering, profiles = self.baseline.signals[kind].phase is Phase.GATHERING, self.profiles[kind]
                (profiles.reference if gathering else profiles.recent).add(sample.prompt)
            self.requests_watched += any(signal.watching for _, signal, _ in signals)
            for kind, signal, _ in signals:
                if signal.watching:
                    self._times.setdefault(signal, deque(maxlen=SAMPLE_TIMES)).append(sample.began)
                    self.rows_watched += 1
                if next(steps[signal]):
                    yield self._alarm(kind, signal, sample.began)
            for kind, signal, _ in known:
                if next(fact_steps[signal]):
                    yield self._alarm(kind, signal, sample.began)
        for each in (*steps.values(), *fact_steps.values()):
            next(each, None)

    def _alarm(self, kind: str, signal: Signal, began: float) -> DriftAlarm:
        self.moved[kind] = describe(signal, self._profiles(kind), self._since(signal))
        self.alarmed[kind] = began
        return DriftAlarm(self.adapter, self.version, kind, signal.beyond(), signal.log_evidence, self.moved[kind])

    def _facts(self, sample: _Sample) -> Iterator[tuple[str, Signal, Facts]]:
        """What is plain about a prompt and about its answer, and the signals that compare it with the first ones; of an
        answer with those to the same parameters."""
        if sample.prompt is not None:
            kind = FOLLOW_UP if sample.later else PROMPT
            yield kind, self.baseline.signals[kind], prompt_facts(sample.prompt)
        strata = self.baseline.strata[OUTPUT]
        if FOLLOW_UP in sample.rows:
            strata.count(sample.stratum)
        signal = strata.signal(sample.stratum) if sample.facts else None
        if signal is not None:
            self.rows_watched += sample.later and signal.fixed.watching
            yield OUTPUT, signal, sample.facts

    def _taken(self, sample: _Sample) -> Iterator[tuple[str, Signal, Floats]]:
        """The signals that take a sample: of its own parameters, and of the lower stratum that it is compared with."""
        for kind, strata in self.baseline.strata.items():
            if kind in sample.rows:
                strata.count(sample.stratum)
        for stratum, rows in ((sample.stratum, sample.rows), (sample.lower, sample.lower_rows)):
            for kind, row in rows.items():
                if sample.routed and kind in PROMPTS:
                    continue
                by_parameters = self.baseline.strata.get(kind)
                signal = by_parameters.signal(stratum) if by_parameters else self.baseline.signals[kind]
                if signal is not None:
                    yield kind, signal, row
        if len(self._times) > MOST_SIGNALS:
            kept = {signal for kind in SIGNALS for signal in self.baseline.every(kind)}
            self._times = {signal: times for signal, times in self._times.items() if signal in kept}

    def _quoted(self, quote: _Quote) -> dict[str, Any]:
        # Redacted before it is cut: half a number would match no pattern.
        answer = self._redacted(quote.answer)[:QUOTED_CHARACTERS]
        described: dict[str, Any] = {"request_id": quote.request_id, "when": iso(quote.began), "answer": answer}
        if self.text is not None:
            prompt = self.text.last(quote.prompt, PROMPT_CHARACTERS)
            described["prompt"] = self._redacted(prompt)[-PROMPT_CHARACTERS:]
        return described

    def _redacted(self, text: str) -> str:
        for pattern in self.settings.redact:
            text = pattern.sub("[redacted]", text)
        return text


def _fact_steps(
    samples: Sequence[_Sample], facts: Sequence[Sequence[tuple[str, Signal, Facts]]]
) -> dict[Signal, Iterator[bool]]:
    """What compares the plain facts of all samples, by signal."""
    units: dict[Signal, list[tuple[Facts, float]]] = {}
    for sample, known in zip(samples, facts, strict=True):
        for _, signal, each in known:
            units.setdefault(signal, []).append((each, sample.began))
    return {
        signal: signal.fact_runs([each for each, _ in known], [began for _, began in known])
        for signal, known in units.items()
    }


def _asker(exchange: Exchange) -> int | None:
    """A number that stays the same over restarts."""
    if exchange.asker is None:
        return None
    return int.from_bytes(hashlib.blake2b(exchange.asker, digest_size=8).digest(), "big")


def iso(seconds: float) -> str:
    """A time as in reports."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
