"""A golden set: prompts for an adapter, each with what a good answer to it is. Bounded, and checked before it is kept.

    {"cases": [
        {"prompt": "The capital of France is", "contains": "Paris"},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "equals": "4", "max_tokens": 4},
        {"prompt": "A date:", "regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
        {"prompt": "As JSON:", "json_schema": {"type": "object", "required": ["city"]}},
        {"prompt": "Be kind.", "judge": {"model": "base", "template": "Is this kind? Yes or no.\\n{answer}"}}
    ]}

As JSON lines it is one case a line. Beside the cases, `"shadow": {"judge": {...}, "share": 0.1}` has a judge grade a
share of a shadow's answers, and the client's answers to the same requests.

A case is known by a digest of all but its name: a set that is changed in one case keeps the outcomes of the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from serve.adapters.patterns import pattern_problem
from serve.errors import BadRequest
from serve.rollout.golden.golden_schema import schema_problem

MAX_CASES = 500
# What one run of a set may generate; a judge's replies count too.
MAX_TOKENS = 200_000
# Of one prompt, as JSON; of what it is held against.
PROMPT_BYTES, EXPECTED_BYTES = 32 << 10, 16 << 10
PATTERN_CHARS = 1000
EXPECTATIONS = ("equals", "contains", "regex", "json_schema", "judge")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

_encode = msgspec.json.Encoder(order="deterministic").encode
_PLACE = re.compile(r"\{(prompt|answer)\}")
_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")


class Judge(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Another model or adapter of this server grades the answer: a number from 0 to 1, or yes or no.

    `template` is what it is asked; {answer} and {prompt} stand for the answer and what was asked.
    """

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    template: Annotated[str, Meta(min_length=1, max_length=8000)]
    max_tokens: Annotated[int, Meta(ge=1, le=64)] = 8

    def __post_init__(self) -> None:
        if "{answer}" not in self.template:
            raise ValueError("a judge's template holds {answer}, where the answer goes, and {prompt} if you like")

    def question(self, prompt: str, answer: str) -> str:
        """The template with both in their places."""
        texts = {"prompt": prompt, "answer": answer}
        return _PLACE.sub(lambda place: texts[place[1]], self.template)


class GoldenCase(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """One prompt, how it is answered, and one expectation.

    `samples` answers are asked for and their mean counts; more than one needs a temperature.
    """

    name: Annotated[str, Meta(max_length=100)] = ""
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=100)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1024)] = 64
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=4)] = []
    samples: Annotated[int, Meta(ge=1, le=8)] = 1
    equals: str | None = None
    contains: Annotated[str, Meta(min_length=1)] | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=PATTERN_CHARS)] | None = None
    json_schema: dict[str, Any] | None = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a case has a prompt or messages, and not both")
        if len(self.expectations) != 1:
            raise ValueError(f"a case has one of {', '.join(EXPECTATIONS)}, not {len(self.expectations)} of them")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("answers at temperature 0 repeat: ask for one sample, or give the case a temperature")
        if len(_encode(self.prompt or self.messages)) > PROMPT_BYTES:
            raise ValueError(f"a case's prompt is above {PROMPT_BYTES >> 10} KiB, the most that is taken")
        for name in EXPECTATIONS[:4]:
            if len(_encode(getattr(self, name))) > EXPECTED_BYTES:
                raise ValueError(f"{name} is above {EXPECTED_BYTES >> 10} KiB, the most that is taken")

    @property
    def expectations(self) -> list[str]:
        return [name for name in EXPECTATIONS if getattr(self, name) is not None]

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits that are another case's if anything but the name differs."""
        return hashlib.blake2b(_encode(msgspec.structs.replace(self, name="")), digest_size=16).hexdigest()

    @property
    def path(self) -> str:
        return TEXT if self.messages is None else CHAT

    @property
    def request(self) -> dict[str, Any]:
        """The request's fields, but for the model."""
        question: dict[str, Any] = {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        more = {name: value for name, value in (("top_p", self.top_p), ("stop", self.stop)) if value}
        return {**question, **options, **more, "stream": False}

    @property
    def asked(self) -> str:
        """What a judge is shown of the question."""
        return asked(self.request)

    @property
    def tokens(self) -> int:
        """What it may generate."""
        return self.samples * (self.max_tokens + (self.judge.max_tokens if self.judge else 0))


class ShadowJudge(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who grades a share of a shadow's answers, and the answers that clients got."""

    judge: Judge
    share: Annotated[float, Meta(gt=0, le=1)] = 0.1


class GoldenSet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """The body of PUT /v1/adapters/NAME/golden."""

    cases: Annotated[list[GoldenCase], Meta(min_length=1, max_length=MAX_CASES)]
    shadow: ShadowJudge | None = None

    def __post_init__(self) -> None:
        if (tokens := sum(case.tokens for case in self.cases)) > MAX_TOKENS:
            raise ValueError(
                f"these cases may generate {tokens} tokens in one run, and a golden set takes up to {MAX_TOKENS}: send "
                "fewer cases, or a smaller max_tokens"
            )

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.encoded(), digest_size=16).hexdigest()

    @cached_property
    def by_key(self) -> Mapping[str, GoldenCase]:
        """The cases in the order in which they are asked: that of their digests, so by chance."""
        return {case.key: case for case in sorted(self.cases, key=lambda case: case.key)}

    @property
    def numbered(self) -> list[tuple[int, GoldenCase]]:
        return list(enumerate(self.cases, 1))

    @property
    def judges(self) -> dict[str, str]:
        """The models that grade, each with where it is named."""
        named = [(case.judge.model, f"cases: case {number}") for number, case in self.numbered if case.judge]
        shadow = [(self.shadow.judge.model, "shadow: it")] if self.shadow else []
        return dict(reversed([*named, *shadow]))

    def described(self) -> dict[str, Any]:
        """As it was put, without what it left out."""
        described: dict[str, Any] = msgspec.to_builtins(self)
        return described

    def encoded(self) -> bytes:
        return _encode(self)

    @classmethod
    def decoded(cls, document: str | bytes) -> GoldenSet:
        """What `encoded` gave."""
        return msgspec.json.decode(document, type=cls)


def check(golden: GoldenSet) -> None:
    """BadRequest for a case that repeats another, or whose pattern or schema cannot be used. Not for the event loop."""
    first: dict[str, int] = {}
    for number, case in golden.numbered:
        if case.key in first:
            raise BadRequest(
                f"cases: case {number} repeats case {first[case.key]}, and the same case again is no new evidence: "
                "leave it out",
                param="cases",
            )
        first[case.key] = number
        if case.regex is not None and (problem := pattern_problem(case.regex)):
            raise BadRequest(f"cases: case {number} has the regex {problem}", param="cases")
        if case.json_schema is not None and (problem := schema_problem(case.json_schema)):
            raise BadRequest(f"cases: case {number} has a json_schema that {problem}", param="cases")
        for message in case.messages or ():
            if not isinstance(message.get("role"), str) or message.get("content") is None:
                raise BadRequest(
                    f"cases: case {number} has a message without role or content: a chat's messages have both",
                    param="cases",
                )


def asked(fields: Mapping[str, Any]) -> str:
    """What a request asks, as a judge is shown it: its prompt, or its last message; "" if it is neither."""
    question = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if isinstance(question, list):
        last = question[-1]
        question = last.get("content") if isinstance(last, dict) else None
    if question is None or isinstance(question, str):
        return question or ""
    return _encode(question).decode()


def grade(reply: str) -> float | None:
    """A judge's reply as a number from 0 to 1; None if it is none."""
    if word := _WORD.match(reply):
        return float(word[1].lower() == "yes")
    number = _NUMBER.search(reply)
    if number is None or reply[number.end() :].lstrip()[:1] in ("/", "%"):
        return None
    value = float(number[0])
    return value if 0 <= value <= 1 else None
