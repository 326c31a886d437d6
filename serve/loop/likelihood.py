"""How likely a version finds the answers of examples, as the engine itself computes it.

The score of an example is exp of the mean log-probability of its answer's tokens given the prompt: the inverse of the
answer's perplexity, from 0 to 1. Asked in the gaps of traffic and behind every client; no metric of traffic counts it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.asgi.exchange import Watch
from serve.asgi.internal_client import post
from serve.engine.background import background_lease, gap
from serve.engine.fleet import Fleet
from serve.engine.payer import Cause, Payer
from serve.engine.supervisor import Supervisor
from serve.errors import EngineUnavailable
from serve.names import shown

MAX_ANSWER = 64 << 20
_TOKENIZE, _COMPLETE = "/tokenize", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Example:
    """A chat that ends with the answer, or a prompt with its completion, in OpenAI's form for fine-tuning.

    `conversation` is the id of the captured one that it is from, if it is from one. `cluster` is the same for examples
    that tell of one another, as those of one asker.
    """

    fields: Mapping[str, Any]
    conversation: str = ""
    cluster: str = field(default="", compare=False)

    @property
    def counted_as(self) -> str:
        """What it is a part of: examples that have this in common count once."""
        return self.cluster or self.conversation or self.digest

    @property
    def digest(self) -> str:
        """The same for the same example, however it is spaced."""
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """An example as the model reads it: the answer begins at `answer`."""

    ids: tuple[int, ...]
    answer: int


class LikelihoodScorer:
    """One for all adapters."""

    def __init__(self, fleet: Fleet, store: Store) -> None:
        self._fleet, self._store = fleet, store

    async def scores(self, version: Adapter, examples: Sequence[Example]) -> list[float | None]:
        """One for each example; None for one that the base's context has no room for, or that has no answer.

        EngineUnavailable if the engine does not answer: that says nothing about the version.
        """
        base = self._fleet.of(version.name)
        found: list[float | None] = []
        for example in examples:
            await gap(base)
            found.append(await self._score(base, version, example))
        return found

    async def _score(self, base: Supervisor, version: Adapter, example: Example) -> float | None:
        payer = Payer(version.tenant, Cause.LOOP, None)
        async with background_lease(base, self._store, version, payer) as lease:

            async def ask(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
                body = {**fields, "model": lease.model}
                answer = await post(lease, where, body, limit=MAX_ANSWER, watch=Watch(background=True))
                if answer.status >= 500 or answer.body is None:
                    raise EngineUnavailable(f"the engine answered {answer.status} to an example of the gate")
                if answer.status != 200:
                    raise _Unusable(shown(answer.body.decode(errors="replace"), 200))
                found: dict[str, Any] = msgspec.json.decode(answer.body)
                return found

            # No client's prompts share this part of the prefix cache.
            more: dict[str, Any] = {"cache_salt": f"loop:{version.tenant}"}
            more |= {} if lease.priority is None else {"priority": lease.priority}
            return await likelihood(example, ask, base.backend.max_model_len, more)


Ask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]


async def likelihood(example: Example, ask: Ask, room: int, more: Mapping[str, Any]) -> float | None:
    """The score of an example by the model behind `ask(path, body)`; `room` are the tokens of its context, `more` what
    else the request says."""
    try:
        tokens = await _tokens(example, ask)
        if not tokens.answer < len(tokens.ids) < room:
            return None
        fields = {"prompt": list(tokens.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, **more}
        return _mean((await ask(_COMPLETE, fields))["choices"][0]["prompt_logprobs"], tokens)
    except _Unusable:
        return None


class _Unusable(Exception):
    """The engine takes no such example."""


async def _tokens(example: Example, ask: Ask) -> _Tokens:
    fields = example.fields
    if "messages" in fields:
        messages = [{key: value for key, value in row.items() if key != "weight"} for row in fields["messages"]]
        tools = {"tools": fields["tools"]} if fields.get("tools") else {}
        opened = {"messages": messages[:-1], "add_generation_prompt": True, **tools}
        whole = {"messages": messages, "add_generation_prompt": False, **tools}
        prompt = (await ask(_TOKENIZE, opened))["tokens"]
        ids = (await ask(_TOKENIZE, whole))["tokens"]
        return _Tokens(tuple(ids), _same(prompt, ids))
    prompt = (await ask(_TOKENIZE, {"prompt": fields["prompt"]}))["tokens"]
    completion = (await ask(_TOKENIZE, {"prompt": fields["completion"], "add_special_tokens": False}))["tokens"]
    return _Tokens((*prompt, *completion), len(prompt))


def _same(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with: a template may write the end of a prompt in another way before an answer."""
    pairs = zip(prompt, whole, strict=False)
    return next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(prompt), len(whole)))


def _mean(rows: Sequence[Mapping[str, Mapping[str, Any]] | None], tokens: _Tokens) -> float:
    """From vLLM's `prompt_logprobs`: for each token what it and the likeliest are worth, by id."""
    found = [rows[at] or {} for at in range(max(1, tokens.answer), len(tokens.ids))]
    ids = tokens.ids[max(1, tokens.answer) :]
    total = math.fsum(float(row[str(id)]["logprob"]) for row, id in zip(found, ids, strict=True))
    return math.exp(min(0.0, total / len(ids)))
