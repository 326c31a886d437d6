"""A guard model says which categories a text falls into: a chat whose answer a grammar holds to their names.

Any base model or adapter can be one; an adapter that was trained on the prompt is better at it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serve.auth.auth import Caller
from serve.engine.payer import Payer
from serve.engine.plain_text import quoted
from serve.errors import BadRequest, EngineUnavailable, NotFound
from serve.gateway.internal_request import InternalAnswer, InternalRequests
from serve.gateway.request import CLASSIFY, InferenceRequest
from serve.names import shown

CHAT = "/v1/chat/completions"
# The probability from which a label holds.
LIKELY = 0.5
# Of one text, in characters, and of one answer, in bytes.
MAX_TEXT, MAX_ANSWER = 64 << 10, 64 << 10
# OpenAI's names, which its clients send without meaning a model of this server.
_THEIRS = re.compile(r"(omni|text)-moderation\b.*")
_PLACE = re.compile(r"\{(categories|text)\}")


class NoVerdict(EngineUnavailable):
    """The guard was asked, and its answer is no verdict: it may say the same of this text again."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The categories that a text falls into, and the version that said so."""

    categories: frozenset[str]
    model: str

    @property
    def flagged(self) -> bool:
        return bool(self.categories)


class Moderator:
    """`model` answers who names none; `prompt` is what it is asked, with {text} and {categories} in it.

    `categories` are words of letters, digits, spaces and -_/.
    """

    def __init__(self, requests: InternalRequests, *, model: str, prompt: str, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        self._requests = requests
        self._model = model
        self._prompt = prompt
        names = "|".join(categories)
        more = f"(, ({names})){{0,{len(categories) - 1}}}" if len(categories) > 1 else ""
        self._pattern = f"(none|({names}){more})"
        # No token is shorter than a character.
        self._tokens = max(8, sum(len(name) + 2 for name in categories))

    async def judge(
        self, caller: Caller, payer: Payer, text: str, model: str | None = None, *, salt: str = "", priority: int = 0
    ) -> Verdict:
        """What the guard says of the text: the model that this name means to `caller`, in the turn of `payer`.

        `salt` keeps its cached prompt apart.

        BadRequest if the guard does not take it; NoVerdict if that is what its answer comes to.
        """
        if len(text) > MAX_TEXT:
            raise BadRequest(f"a text to moderate has up to {MAX_TEXT} characters, not {len(text)}", param="input")
        asked = self._named(model)
        text = quoted(text, self._requests.special_tokens(caller, asked))
        if labels := self._requests.labels(caller, asked):
            return await self._classified(caller, payer, text, asked, labels, salt, priority)
        fields = {
            "model": asked,
            "messages": [{"role": "user", "content": self._question(text)}],
            "max_tokens": self._tokens,
            "temperature": 0,
            "structured_outputs": {"regex": self._pattern},
            **({"cache_salt": salt} if salt else {}),
        }
        request = InferenceRequest(msgspec.json.encode(fields))
        answer = await self._requests.ask(caller, CHAT, request, payer=payer, limit=MAX_ANSWER, priority=priority)
        return _verdict(answer, asked, self.categories)

    async def _classified(
        self, caller: Caller, payer: Payer, text: str, asked: str, labels: Sequence[str], salt: str, priority: int
    ) -> Verdict:
        """By a head of labels: those that are categories, and likelier than not. One pass over the text."""
        if not set(labels) & set(self.categories):
            raise BadRequest(
                f"the labels of the guard {shown(asked)} are {', '.join(labels)}, and none is a category of this "
                f"server ({', '.join(self.categories)}): name them alike (its `id2label`, moderation_categories)",
                param="model",
            )
        fields = {"model": asked, "input": text, **({"cache_salt": salt} if salt else {})}
        request = InferenceRequest(msgspec.json.encode(fields))
        answer = await self._requests.ask(caller, CLASSIFY, request, payer=payer, limit=MAX_ANSWER, priority=priority)
        return _by_labels(answer, asked, labels, self.categories)

    def _named(self, model: str | None) -> str:
        name = self._model if model is None or _THEIRS.fullmatch(model) else model
        if not name:
            raise NotFound(
                "no guard model is set here: send the name of a model or an adapter as `model`, or set "
                "moderation_model",
                code="model_not_found",
                param="model",
            )
        return name

    def _question(self, text: str) -> str:
        places = {"categories": ", ".join(self.categories), "text": text}
        return _PLACE.sub(lambda place: places[place[1]], self._prompt)


def _by_labels(answer: InternalAnswer, guard: str, labels: Sequence[str], categories: Sequence[str]) -> Verdict:
    fields = _body(answer, guard)
    try:
        probabilities = dict(zip(labels, fields["data"][0]["probs"], strict=True))
        likely = {label for label, probability in probabilities.items() if probability >= LIKELY}
        return Verdict(frozenset(likely & set(categories)), str(fields["model"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NoVerdict(f"the guard {shown(guard)} gave no answer that can be read") from error


def _body(answer: InternalAnswer, guard: str) -> dict[str, Any]:
    """What a guard answered; BadRequest if it does not take the text, else NoVerdict."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(answer.recorded.body or b"")
        if answer.recorded.status == 200:
            return fields
        message = str(fields["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise NoVerdict(f"the guard {shown(guard)} gave no answer that can be read") from error
    if answer.recorded.status < 500:
        raise BadRequest(f"the guard {shown(guard)} does not take this text: {shown(message, 300)}", param="input")
    raise NoVerdict(f"the guard {shown(guard)} did not answer: {shown(message, 300)}")


def _verdict(answer: InternalAnswer, guard: str, categories: Sequence[str]) -> Verdict:
    fields = _body(answer, guard)
    try:
        said = str(fields["choices"][0]["message"]["content"])
        model = str(fields["model"])
    except (KeyError, IndexError, TypeError) as error:
        raise NoVerdict(f"the guard {shown(guard)} gave no answer that can be read") from error
    names = {name.strip() for name in said.split(",")} & set(categories)
    if not names and said.strip() != "none":
        raise NoVerdict(f"the guard {shown(guard)} said {shown(said, 80)}: no category and not none")
    return Verdict(frozenset(names), model)
