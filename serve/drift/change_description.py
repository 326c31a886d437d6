"""What moved, in words that a person can act on, and as fields: language, length, topic, share, since when.

    describe_prompts(signal, before, recent, since)["text"]
    "since 2026-11-25T10:00:00+00:00, in at least 60 % of the prompts: probably German (1 % before, 62 % now), ..."

Words and languages are named where they are frequent among different askers (`features.word_counts`). No sentence
names a tenant: it stands in histories that tenants read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.drift.answer_facts import CUT as CUTS
from serve.drift.answer_facts import LANGUAGE, LATER_LONGER, LATER_SHORTER, LONGER, NO_JSON, SHORTER
from serve.drift.answer_facts import REFUSAL as REFUSALS
from serve.drift.answer_facts import REPETITION as REPETITIONS
from serve.drift.detector.fixed_reference import Moved
from serve.drift.features.features import FOLLOW_UP, LOGPROB, OUTPUT, PROMPT, PROMPTS
from serve.drift.features.traffic_profile import (
    TrafficProfile,
    TrafficProfiles,
    mark_shares,
    shares_of,
    typical_tokens,
)
from serve.drift.prompt_facts import LANGUAGE as LANGUAGE_OF_PROMPTS
from serve.drift.signal import Signal
from serve.models.language import NAMES
from serve.models.text_marks import SAID

# Changes that are named: of a language's or topic's share, of a length by a factor, of shares of answers.
SHARE = 0.05
FACTOR = 1.25
TOPICS, WORDS = 2, 6
# One word names no topic: in so few requests it may be anybody's.
FEWEST_WORDS = 2
# A topic is new if its words are so many times as frequent as in the nearest topic before.
NEW = 4.0
NOUNS = {PROMPT: "prompts", FOLLOW_UP: "conversations' follow-ups"}
# Of answers, what there is more of.
MORE = {
    REFUSALS: "refusals",
    CUTS: "answers cut off by the limit of tokens",
    REPETITIONS: "answers that repeat themselves",
    LANGUAGE: "answers in another language than what is asked",
    NO_JSON: "answers that are no JSON where that is asked",
}
# And how they are.
LENGTHS = {
    LONGER: "longer answers",
    SHORTER: "shorter answers",
    LATER_LONGER: "longer answers later in conversations",
    LATER_SHORTER: "shorter answers later in conversations",
}
# Of fewer prompts no language is named, unless it is known to be another one.
FEW = 3
# A smaller share of the requests is "some".
LEAST = 0.01


# What is said where nothing that has a name is otherwise.
UNNAMED = "other wording, of which neither language, length nor words stand out"


def describe(signal: Signal, profiles: TrafficProfiles, since: str | None) -> dict[str, Any]:
    """What moved of one signal since it began to. `text` is a sentence, the rest depends on the signal.

    profiles: what a signal of prompts was about; of any other one they say nothing.
    """
    moved = signal.moved()
    if signal.kind in PROMPTS:
        fields, parts = _prompts(signal, moved, profiles.reference, profiles.recent)
    elif moved:
        return _moves(moved, since)
    elif signal.kind == OUTPUT:
        fields, parts = _answers(signal)
    elif signal.kind == LOGPROB:
        fields, parts = _logprobs(signal)
    else:
        fields, parts = {}, []
    noun = NOUNS.get(signal.kind, "answers")
    share = _share(signal, fields)
    when = f"since {since}, " if since else ""
    part = f"at least {_percent(share)}" if share >= LEAST else "some"
    text = f"{when}in {part} of the {noun}: {', '.join(parts) or UNNAMED}"
    return {"text": text, "since": since, "requests": _changed(signal), "share_at_least": share, **fields}


def clearer(then: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Of two descriptions of an open alarm the one of now, unless it has lost the cause that the earlier one named: few
    loops among the latest answers, say, after many."""
    lost = then is not None and UNNAMED in now["text"] and UNNAMED not in then["text"]
    return then if then is not None and lost else now


def describe_probe(ratio: float) -> dict[str, Any]:
    """What a probe's alarm says."""
    return {
        "text": f"fixed prompts are answered otherwise than at first, by {ratio:.1f} times the noise: "
        "the weights, the base model or the engine have changed",
        "noise_ratio": round(ratio, 3),
    }


def movement(signal: Signal, row: NDArray[np.floating]) -> float:
    """How far a raw row lies along the change: 0 where the reference does, 1 where the mean row since it began does."""
    reference, rows = signal.reference_row, signal.changed_rows()
    if reference is None or not len(rows):
        return 0.0
    change = rows.mean(axis=0) - reference
    return float((signal.raw(row) - reference) @ change / max(float(change @ change), 1e-12))


def for_tenant(moved: Mapping[str, Any], tenant: str) -> dict[str, Any]:
    """What one tenant may see: of the tenants only itself."""
    tenants = moved.get("tenants")
    if tenants is None:
        return dict(moved)
    own = {when: {name: share for name, share in shares.items() if name == tenant} for when, shares in tenants.items()}
    return {**moved, "tenants": own}


def _prompts(
    signal: Signal, moved: Sequence[Moved], before: TrafficProfile, recent: TrafficProfile
) -> tuple[dict[str, Any], list[str]]:
    reference, now = before.last(len(before.seen)), recent.last(_changed(signal))
    languages = {
        when: shares_of(request.language for request in requests if request.language)
        for when, requests in (("before", reference), ("now", now))
    }
    length_before, length_now = typical_tokens(reference), typical_tokens(now)
    topics = _topics(before, recent, shares_of(request.topic for request in now))
    fields: dict[str, Any] = {
        "language": languages,
        "length": {"unit": "tokens", "before": length_before, "now": length_now},
        "topics": topics,
        "writing": {"before": mark_shares(reference), "now": mark_shares(now)},
        "tenants": {
            "before": shares_of(request.tenant for request in reference),
            "now": shares_of(request.tenant for request in now),
        },
    }
    plain = {each.name: each for each in moved}
    least = 0.0 if LANGUAGE_OF_PROMPTS in plain else max(SHARE, FEW / max(len(now), 1))
    parts = [*_language_parts(languages, least)]
    parts += [_shares(SAID[name], each.before, each.now) for name, each in plain.items() if name in SAID]
    parts += [] if plain else _mark_parts(fields["writing"])
    parts += _length_parts(length_before, length_now)
    named = [topic for topic in topics if len(topic["words"]) >= FEWEST_WORDS and topic["share"] >= SHARE]
    if named:
        topic = max(named, key=lambda each: (each["new"], each["share"]))
        parts.insert(0 if topic["new"] else len(parts), _topic_part(topic))
    return fields, parts


def _topics(before: TrafficProfile, recent: TrafficProfile, shares: Mapping[int, float]) -> list[dict[str, Any]]:
    """The largest topics of the moved requests, each with the reference's topic that lies nearest."""
    rows = []
    for number, share in list(shares.items())[:TOPICS]:
        nearest: list[str] = []
        topic, new = recent.topics[number], True
        words = topic.typical(before.topics, WORDS)
        if before.topics:
            near = before.topics[before.nearest(recent.centres[number])]
            nearest = near.typical([words for words in before.topics if words is not near], WORDS)
            new = topic.frequency(words) > NEW * near.frequency(words)
        rows.append({"share": share, "words": words, "new": new, "nearest_before": nearest})
    return rows


def _topic_part(topic: Mapping[str, Any]) -> str:
    words = ", ".join(topic["words"])
    said = (
        f"about a new topic (in {_percent(topic['share'])} of those since): {words}"
        if topic["new"]
        else f"about {words}"
    )
    nearest = ", ".join(topic["nearest_before"])
    return f"{said} (the nearest topic before: {nearest})" if nearest else said


def _language_parts(shares: Mapping[str, Mapping[str, float]], least: float) -> Iterator[str]:
    rise = {language: now - shares["before"].get(language, 0.0) for language, now in shares["now"].items()}
    if not rise:
        return
    language = max(rise, key=lambda name: rise[name])
    if rise[language] >= least:
        said = f"probably {NAMES.get(language, language)}"
        yield _shares(said, shares["before"].get(language, 0.0), shares["now"][language])


def _mark_parts(shares: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """How more of the prompts are written than before."""
    for mark, now in shares["now"].items():
        before = shares["before"].get(mark, 0.0)
        if now - before >= SHARE:
            yield _shares(SAID[mark], before, now)


def _length_parts(before: float | None, now: float | None) -> Iterator[str]:
    if before is None or now is None:
        return
    factor = (now + 1) / (before + 1)
    if not 1 / FACTOR < factor < FACTOR:
        yield f"{'longer' if factor > 1 else 'shorter'} (typically {before:.0f} tokens before, {now:.0f} now)"


def _answers(signal: Signal) -> tuple[dict[str, Any], list[str]]:
    rows, reference = signal.changed_rows(), signal.reference_row
    if reference is None or not len(rows):
        return {}, []
    where = {name: number for number, name in enumerate(signal.names)}
    before = {name: float(reference[where[name]]) for name in where}
    now = {name: float(rows[:, where[name]].mean()) for name in where}
    # Lengths are logarithms there: these are geometric means.
    length_before, length_now = round(math.expm1(before["length"])), round(math.expm1(now["length"]))
    fields: dict[str, Any] = {"length": {"unit": "tokens", "before": length_before, "now": length_now}}
    for name in ("ended_by_length", "refusal"):
        fields[name] = {"before": round(max(before[name], 0.0), 3), "now": round(now[name], 3)}
    fields["repetition"] = {"before": round(1 - before["distinct_2"], 3), "now": round(1 - now["distinct_2"], 3)}
    return fields, [part.replace(" (", " answers (", 1) for part in _length_parts(length_before, length_now)]


def _moves(moved: Sequence[Moved], since: str | None) -> dict[str, Any]:
    """What a report says where plain facts of answers left their reference: they are what can be acted on."""
    fields: dict[str, Any] = {}
    parts = []
    for each in moved:
        if each.name in LENGTHS:
            before, now = round(math.expm1(each.before)), round(math.expm1(each.now))
            fields["length"] = {"unit": "tokens", "before": before, "now": now}
            parts.append(f"{LENGTHS[each.name]} (typically {before} tokens before, {now} now)")
        else:
            fields[each.name] = {"before": round(each.before, 3), "now": round(each.now, 3)}
            parts.append(f"more {MORE[each.name]} ({_percent(each.before)} before, {_percent(each.now)} now)")
    share = max((round(each.now - each.before, 2) for each in moved if each.name in MORE), default=0.0)
    text = f"{f'since {since}, ' if since else ''}{', '.join(parts)}"
    return {"text": text, "since": since, "requests": moved[0].count, "share_at_least": share, **fields}


def _logprobs(signal: Signal) -> tuple[dict[str, Any], list[str]]:
    change = signal.effects().get("logprob", 0.0)
    fields = {"logprob_change": round(change, 3)}
    if not change:
        return fields, []
    sure = "surer" if change > 0 else "less sure"
    return fields, [f"the version is {sure} of its answers by {abs(change):.2f} nat a token, at equal prompts"]


def _share(signal: Signal, fields: Mapping[str, Any]) -> float:
    """A share q of other requests moves a rank by q / 2 at most, and a language's share by q at most."""
    effects = signal.effects()
    shares = [2 * abs(effects.get("rank_shift", 0.0)), effects.get("foreign_share", 0.0)]
    shares += [each.now - each.before for each in signal.moved()]
    languages: Mapping[str, Mapping[str, float]] = fields.get("language", {})
    for language, now in languages.get("now", {}).items():
        error = math.sqrt(now * (1 - now) / max(_changed(signal), 1))
        shares.append(now - languages["before"].get(language, 0.0) - error)
    return round(min(max(shares), 1.0), 2)


def _changed(signal: Signal) -> int:
    """Requests since the change began."""
    moved = signal.moved()
    return moved[0].count if moved else signal.samples - (signal.changed_at or 0)


def _shares(what: str, before: float, now: float) -> str:
    return f"{what} ({_percent(before)} before, {_percent(now)} now)"


def _percent(share: float) -> str:
    return f"{100 * np.clip(share, 0, 1):.0f} %"
