"""What is plain about one answer: it refuses, is cut off, repeats itself, is in another language, is no JSON.

    facts = answer_facts(generation, stratum.tokens, asks_json=asks_json(question))
    facts |= other_language(spoken(generation.text), language)

Numbers by name, each from 0 to 1, None where it cannot be told; and how long the answer is, twice: as `longer` and as
`shorter`, for `detector.fixed_reference`. How long those are that go on with a conversation has names of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from serve.asgi.exchange import Generation
from serve.drift.detector.fixed_reference import Kind
from serve.models.language import CODE, language_of
from serve.models.refusals import refuses

Facts: TypeAlias = Mapping[str, float | None]

REFUSAL, CUT = "refusal", "ended_by_length"
REPETITION = "repetition"
LANGUAGE, NO_JSON = "other_language", "no_json"
SHARES = (REFUSAL, CUT, REPETITION, LANGUAGE, NO_JSON)
LONGER, SHORTER = "longer", "shorter"
LATER_LONGER, LATER_SHORTER = "longer_later", "shorter_later"
KINDS = dict.fromkeys(SHARES, Kind.SHARE)
KINDS |= {LONGER: Kind.RANK, SHORTER: Kind.LOW_RANK, LATER_LONGER: Kind.RANK, LATER_SHORTER: Kind.LOW_RANK}
# What harms most is seen a little sooner.
WEIGHTS = {REFUSAL: 6.0, REPETITION: 2.0, SHORTER: 2.0}
# An answer loops if of the pairs among its last tokens so few are distinct; of a shorter one that cannot be told.
LAST, FEWEST = 128, 32
DISTINCT = 0.5
# Characters of an answer that are read for its language.
READ = 400


def answer_facts(generation: Generation, tokens: int, *, asks_json: bool) -> dict[str, float | None]:
    """All but the language. tokens: so much of an answer is looked at, 0 for all."""
    text, output = generation.text, generation.output
    cut = generation.finish_reason == "length" or 0 < tokens < len(output)
    length = math.log1p(min(len(output), tokens) if tokens else len(output))
    return {
        REFUSAL: float(refuses(text)) if text else None,
        CUT: float(cut),
        REPETITION: _loops(output[:tokens] if tokens else output),
        NO_JSON: float(not _is_json(text)) if asks_json and text and generation.finish_reason != "length" else None,
        LONGER: length,
        SHORTER: length,
    }


def spoken(text: str) -> str:
    """The language of an answer, "" where it cannot be told."""
    return language_of(text[:READ])


def other_language(answer: str, question: str) -> dict[str, float | None]:
    """Whether an answer is in another language than what is asked."""
    told = answer and question and CODE not in (answer, question)
    return {LANGUAGE: float(answer != question) if told else None}


def first_hits(block: Sequence[Facts]) -> dict[str, float | None]:
    """Of the last of some answers that belong together, but for what an answer before it has had: so each counts as it
    comes, and answers of one conversation that are refused alike count once."""
    return {name: None if any(facts.get(name) for facts in block[:-1]) else block[-1].get(name) for name in SHARES}


def block_facts(block: Sequence[Facts]) -> dict[str, float | None]:
    """Of all answers that belong together: the mean length."""
    lengths = [length for facts in block if (length := facts[LONGER]) is not None]
    return dict.fromkeys((LATER_LONGER, LATER_SHORTER), sum(lengths) / len(lengths) if lengths else None)


def asks_json(question: Mapping[str, Any] | None) -> bool:
    """Whether a request wants nothing but JSON, by any of the APIs."""
    if question is None:
        return False
    text = question.get("text")
    wanted = question.get("response_format") or (text.get("format") if isinstance(text, Mapping) else None)
    return isinstance(wanted, Mapping) and wanted.get("type") in ("json_object", "json_schema")


def _loops(output: Sequence[int]) -> float:
    last = output[-LAST:]
    if len(last) < FEWEST:
        return 0.0
    pairs = set(pairwise(last))
    return float(len(pairs) < DISTINCT * (len(last) - 1))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
