"""Asks a version its golden cases, in the gaps of traffic, and has judges grade what they are to grade.

As the prober asks: through vLLM's own app, in the background (serve.engine.background). Drift does not see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from serve.adapters.adapter import Adapter
from serve.adapters.added_tokens import control_tokens
from serve.adapters.store import Store
from serve.asgi.exchange import Watch
from serve.asgi.internal_client import post
from serve.engine.background import background_lease, gap, is_idle
from serve.engine.fleet import Fleet
from serve.engine.payer import Cause, Payer
from serve.engine.plain_text import quoted
from serve.engine.supervisor import Supervisor
from serve.errors import NotFound
from serve.names import shown
from serve.rollout.golden.golden_scoring import CaseScore, score
from serve.rollout.golden.golden_set import CHAT, GoldenCase, Judge, grade
from serve.rollout.golden.golden_store import Outcome

MAX_ANSWER = 1 << 20
# Cases at a time while no client is answered; beside clients it is one.
AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Model:
    """Who answers: an adapter's version, or a base model."""

    base: Supervisor
    adapter: Adapter | None = None

    @property
    def id(self) -> str:
        """The same as long as its answers are: the weights, and the base model under them."""
        return f"{self.adapter.id if self.adapter else self.base.name} on {self.base.model}"


class Refused(Exception):
    """The engine did not take this request; the message is its own."""


class GoldenRunner:
    """`resolve(model, tenant)`: the version that a public name means to a tenant now, None for a base; or NotFound."""

    def __init__(self, fleet: Fleet, store: Store, resolve: Callable[[str, str], Adapter | None]) -> None:
        self._fleet = fleet
        self._store = store
        self.resolve = resolve

    def owner(self, name: str) -> Supervisor | None:
        """The base that the adapter runs on, if there is such an adapter and base."""
        return self._fleet.owner(name)

    def model(self, adapter: Adapter) -> Model:
        return Model(self._fleet.of(adapter.name), adapter)

    def judge(self, judge: Judge, tenant: str) -> Model:
        """Who grades; NotFound if this tenant may not ask it, or nobody serves it."""
        adapter = self.resolve(judge.model, tenant)
        return self.model(adapter) if adapter else Model(self._fleet.get(judge.model))

    def basis(self, adapter: Adapter, case: GoldenCase) -> str:
        """What an outcome depends on beside the version and the case: the base model, and who judges."""
        basis = self.model(adapter).base.model
        if case.judge is None:
            return basis
        try:
            return f"{basis}, judged by {self.judge(case.judge, adapter.tenant).id}"
        except NotFound:
            return f"{basis}, judged by nobody"

    def is_idle(self, adapter: Adapter) -> bool:
        """No client is answered by the engine of this version."""
        return is_idle(self._fleet.of(adapter.name))

    async def run(self, adapter: Adapter, case: GoldenCase, payer: Payer) -> Outcome:
        """The outcome of one case; an error of the engine itself is raised: it says nothing about the version.

        What the judges of its cases say is the payer's too, as `judge`.
        """
        basis = self.basis(adapter, case)
        values = []
        answers = []
        scored = CaseScore(None)
        for _ in range(case.samples):
            try:
                answer = await self._ask(self.model(adapter), adapter.tenant, case.path, case.request, payer)
                answers.append(answer)
                scored = await self._score(adapter, case, answer, payer)
            except Refused as refused:
                scored = CaseScore(None, f"the engine answered: {shown(refused, 300)}")
            if scored.value is None:
                break
            values.append(scored.value)
        if scored.value is not None:
            scored = CaseScore(sum(values) / len(values), scored.detail)
        return Outcome(case.key, basis, scored.result, scored.value, "\n---\n".join(answers), scored.detail)

    async def _score(self, adapter: Adapter, case: GoldenCase, answer: str, payer: Payer) -> CaseScore:
        if case.judge is None:
            return await asyncio.to_thread(score, case, answer)
        return await self.grade(case.judge, adapter.tenant, case.asked, answer, payer)

    async def ask(self, adapter: Adapter, path: str, fields: Mapping[str, Any], payer: Payer) -> str:
        """What a version answers to this request; Refused."""
        return await self._ask(self.model(adapter), adapter.tenant, path, fields, payer)

    async def grade(self, judge: Judge, tenant: str, asked: str, answer: str, payer: Payer) -> CaseScore:
        """What a judge says about an answer."""
        try:
            model = self.judge(judge, tenant)
        except NotFound as missing:
            return CaseScore(None, f"the judge {shown(judge.model)} is not there: {missing.message}")
        special = control_tokens(model.base.backend.tokens, model.adapter)
        text = judge.question(quoted(asked, special), quoted(answer, special))
        question = [{"role": "user", "content": text}]
        fields = {"messages": question, "max_tokens": judge.max_tokens, "temperature": 0, "stream": False}
        try:
            reply = await self._ask(model, tenant, CHAT, fields, payer.because(Cause.JUDGE))
        except Refused as refused:
            return CaseScore(None, f"the judge answered: {shown(refused, 300)}")
        value = grade(reply)
        if value is None:
            return CaseScore(None, f"the judge said {shown(reply)}: neither a number from 0 to 1 nor yes or no")
        return CaseScore(value, f"the judge said {shown(reply)}")

    async def _ask(self, model: Model, tenant: str, path: str, fields: Mapping[str, Any], payer: Payer) -> str:
        """The text of an answer."""
        await gap(model.base)
        async with background_lease(model.base, self._store, model.adapter, payer) as lease:
            # No client's prompts share this part of the prefix cache: how fast they are answered would tell of these.
            body = {**fields, "model": lease.model, "cache_salt": f"golden:{tenant}"}
            if lease.priority is not None:
                body["priority"] = lease.priority
            answer = await post(lease, path, body, limit=MAX_ANSWER, watch=Watch(background=True))
        if answer.status != 200 or answer.body is None:
            raise Refused(f"{answer.status} {_message(answer.body or b'')}")
        return _text(answer.body)


def _text(body: bytes) -> str:
    """What a chat or a completion says; "" for an answer without text, such as a tool call."""
    try:
        choice = msgspec.json.decode(body)["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"].get("content")
    except (msgspec.DecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f"an answer without a choice: {shown(body.decode(errors='replace'))}") from error
    return text if isinstance(text, str) else ""


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return shown(body.decode(errors="replace"))
