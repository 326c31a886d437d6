"""An example to train on: what was asked, and an answer to it that somebody approved; or why a request is none."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from serve.dataset.asked_text import Asked
from serve.dataset.conversations import Captured
from serve.dataset.feedback import GOOD
from serve.dataset.near import Sketch, bared, sketch
from serve.models.language import language_of
from serve.telemetry.personal_data import blacked_out

# Of a question, what is looked at to say which language it is in.
READ = 2000


class Source(StrEnum):
    """Who approved an answer; the first one counts most."""

    CORRECTED = "corrected"
    RATED_UP = "rated_up"
    UNRATED = "unrated"


class Dropped(StrEnum):
    """Why a request is no example."""

    RATED_DOWN = "rated_down"
    NOT_APPROVED = "not_approved"
    CUT_OFF = "cut_off"
    OTHER_FORM = "other_form"
    GOLDEN = "golden"
    HELD_OUT_BEFORE = "held_out_before"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    NEAR_HELD_OUT = "near_held_out"
    BALANCE = "balance"
    LIMIT = "limit"


@dataclass(frozen=True)
class Example:
    """`source` is None for an answer that is none to learn: `answer` is then what should not have been said."""

    id: str
    conversation: str
    asker: str
    moment: float
    asked: Asked
    answer: str
    source: Source | None
    personal: Mapping[str, int]

    @cached_property
    def question(self) -> str:
        """What two requests that ask the same have in common: all but the instructions of the system."""
        return question_of(self.asked)

    @cached_property
    def system(self) -> str:
        return (
            "" if isinstance(self.asked, str) else "\n".join(text for role, text in _said(self.asked) if _ruling(role))
        )

    @cached_property
    def asked_digest(self) -> bytes:
        """The same for the same question under the same instructions."""
        whole = f"{bared(self.system)}\0{bared(self.question) or self.question}"
        return hashlib.blake2b(whole.encode("utf-8", "replace"), digest_size=16).digest()

    @cached_property
    def question_sketch(self) -> Sketch:
        return sketch(self.question)

    @cached_property
    def answer_sketch(self) -> Sketch:
        return sketch(self.answer)

    @cached_property
    def topic(self) -> str:
        """A stratum: the instructions, the language and the length of what is asked."""
        system = hashlib.blake2b(bared(self.system).encode("utf-8", "replace"), digest_size=4).hexdigest()
        length = next((name for name, most in _LENGTHS if len(self.question) <= most), "longest")
        language = language_of(self.question[-READ:]) or "any language"
        return f"{'no instructions' if not self.system else f'instructions {system}'}, {language}, {length}"

    @property
    def day(self) -> int:
        return int(self.moment // 86_400)

    def line(self) -> dict[str, Any]:
        """As a supervised job takes it: of a chat the last answer alone is learned."""
        if isinstance(self.asked, str):
            return {"prompt": self.asked, "completion": self.answer}
        earlier = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in self.asked]
        return {"messages": [*earlier, {"role": "assistant", "content": self.answer}]}


_LENGTHS = (("short", 200), ("medium", 1000), ("long", 4000))


def question_of(asked: Asked) -> str:
    """What is asked, without the instructions of the system."""
    return asked if isinstance(asked, str) else "\n".join(text for role, text in _said(asked) if not _ruling(role))


def examples_of(captured: Captured, unrated: bool) -> tuple[list[Example], Dropped | None]:
    """The examples that a request gives, the one to learn first; and why there is none to learn, if there is none.

    A corrected answer gives two: the correction, and what should not have been said. `unrated`: answers that nobody
    said anything of are good enough.
    """
    source, why = _judged(captured, unrated)
    asked, personal = _clean(captured.asked)
    said, own = blacked_out(captured.answer)
    made = []
    if source is not None:
        answer, kinds = (said, own) if captured.correction is None else blacked_out(captured.correction)
        made.append(_example(captured, asked, answer, source, Counter([*personal, *kinds])))
    worse = why is Dropped.RATED_DOWN or (source is Source.CORRECTED and bared(said) != bared(made[0].answer))
    if worse and said.strip():
        made.append(_example(captured, asked, said, None, {}))
    return made, why


def lines_of(captured: Captured) -> list[dict[str, Any]]:
    """Every line to learn that a build may have made of a request, whatever was said of it then."""
    asked, _ = _clean(captured.asked)
    answers = [text for text in (captured.answer, captured.correction) if text is not None]
    return [_example(captured, asked, blacked_out(text)[0], None, {}).line() for text in answers]


def _judged(captured: Captured, unrated: bool) -> tuple[Source | None, Dropped | None]:
    if captured.correction is not None and captured.correction.strip():
        return Source.CORRECTED, None
    if captured.rating is not None and captured.rating < GOOD:
        return None, Dropped.RATED_DOWN
    if captured.rating is None and not unrated:
        return None, Dropped.NOT_APPROVED
    if captured.finish != "stop" or not captured.answer.strip():
        return None, Dropped.CUT_OFF
    return (Source.UNRATED if captured.rating is None else Source.RATED_UP), None


def _example(
    captured: Captured, asked: Asked, answer: str, source: Source | None, personal: Mapping[str, int]
) -> Example:
    known = (captured.id, captured.conversation, captured.asker, captured.moment)
    return Example(*known, asked, answer, source, personal)


def _clean(asked: Asked) -> tuple[Asked, list[str]]:
    """Without personal data, and the kinds of what there was."""
    if isinstance(asked, str):
        return blacked_out(asked)
    messages, kinds = [], list[str]()
    for message in asked:
        text, found = blacked_out(message["content"])
        messages.append({"role": message["role"], "content": text})
        kinds += found
    return messages, kinds


def preference(asked: Asked, good: str, bad: str) -> dict[str, Any]:
    """As a job with the method dpo takes it."""
    better, worse = ([{"role": "assistant", "content": answer}] for answer in (good, bad))
    return {"input": {"messages": asked}, "preferred_output": better, "non_preferred_output": worse}


def encoded(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _said(asked: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in asked]


def _ruling(role: str) -> bool:
    return role in ("system", "developer")
