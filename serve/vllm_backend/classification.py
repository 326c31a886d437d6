"""`/classify` of an adapter with a classification head, on a base that generates.

The head's scores take the place of the last token's logits, beside one that is 0 (saved_modules): a request for one
token is one pass over the prompt, and the log-probabilities of the first tokens, less that of the zero, are the scores.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.sampling_params import SamplingParams

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.saved_modules import Head, head_of
from serve.adapters.tensors import read_header
from serve.adapters.untrusted import open_plain
from serve.errors import BadRequest
from serve.names import shown

PATH = "/classify"
PREFIX = "classify"

Score = Callable[[str, Any, str | None, int], Awaitable[tuple[list[float], int]]]


def read_head(folder: Path) -> Head | None:
    """The head of an adapter that was inspected."""
    with open_plain(folder / WEIGHTS) as file:
        return head_of(read_header(file), json.loads((folder / CONFIG).read_text()))


class AllScores(SamplingParams):
    """May ask for more log-probabilities than clients may. No other token has any, so the likeliest are the labels.

    `logprob_token_ids` is not for this: beside a request with them, vLLM answers no other request's `logprobs`.
    """

    def _validate_logprobs(self, model_config: Any) -> None:
        return


def parameters(head: Head) -> SamplingParams:
    """What has the engine tell all of a head's scores."""
    return AllScores(temperature=0, max_tokens=1, logprobs=len(head.labels) + 1, detokenize=False)


def scores(head: Head, logprobs: dict[int, Any]) -> list[float]:
    """The head's own numbers."""
    zero = logprobs[len(head.labels)].logprob
    return [logprobs[label].logprob - zero for label in range(len(head.labels))]


def probabilities(head: Head, values: Sequence[float]) -> list[float]:
    """Of the labels: each by itself, or one of all."""
    if head.independent:
        return [1 / (1 + math.exp(-min(max(value, -700.0), 700.0))) for value in values]
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return [part / sum(parts) for part in parts]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a body asks."""

    inputs: list[Any]
    activated: bool
    salt: str | None
    priority: int


class Classifications:
    """vLLM's app, with this route before it. `head` says which adapter has one, `score` asks the engine."""

    def __init__(self, app: ASGIApp, head: Callable[[str], Head | None], score: Score) -> None:
        self.app = app
        self._head = head
        self._score = score
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        fields = await request.json()
        model = str(fields.get("model"))
        head = self._head(model)
        if head is None:
            raise BadRequest(
                f"{shown(model.partition('@')[0])} has no classification head, so it classifies nothing: push an "
                "adapter that was trained for it (task_type SEQ_CLS)",
                param="model",
            )
        asked = _read(fields)
        answers = await _all([self._score(model, text, asked.salt, asked.priority) for text in asked.inputs])
        data = [_described(head, number, values, asked.activated) for number, (values, _) in enumerate(answers)]
        tokens = sum(count for _, count in answers)
        body = {
            "id": f"{PREFIX}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
        await JSONResponse(body)(scope, receive, send)


async def _all(asking: list[Any]) -> list[Any]:
    """Of several questions all answers; the first error ends the others."""
    tasks = [asyncio.ensure_future(question) for question in asking]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _described(head: Head, number: int, values: list[float], activated: bool) -> dict[str, Any]:
    label = head.labels[max(range(len(values)), key=values.__getitem__)]
    probs = probabilities(head, values) if activated else values
    return {"index": number, "label": label, "probs": probs, "num_classes": len(values)}


def _read(fields: dict[str, Any]) -> _Asked:
    inputs = fields.get("input")
    tokens = isinstance(inputs, list) and bool(inputs) and all(type(token) is int for token in inputs)
    if isinstance(inputs, str) or tokens:
        inputs = [inputs]
    if not isinstance(inputs, list) or not inputs or not all(_is_input(each) for each in inputs):
        raise BadRequest("input takes a text, or a list of texts or of token ids", param="input")
    activated = fields.get("use_activation")
    if not isinstance(activated, bool | None):
        raise BadRequest(f"use_activation is {shown(activated, 40)}; it must be true or false", param="use_activation")
    return _Asked(inputs, activated is not False, fields.get("cache_salt"), int(fields.get("priority") or 0))


def _is_input(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
