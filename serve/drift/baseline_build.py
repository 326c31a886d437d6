"""Builds a version's baseline from prompts that no client sent, before its first traffic.

It answers them as a shadow does: through vLLM's own app, in the background (serve.engine.background).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.asgi.exchange import Exchange, Watch
from serve.asgi.internal_client import post
from serve.engine.background import background_lease
from serve.engine.engine import Lease
from serve.engine.fleet import Fleet
from serve.engine.payer import Payer
from serve.errors import BadRequest

AT_ONCE = 8
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What of an answer is kept: its errors are quoted; the rest is read at the engine.
MAX_ANSWER = 1 << 20


class BaselineBuild:
    """`run` gives the exchanges, in the order of the prompts; each prompt is a text or a list of chat messages."""

    def __init__(self, fleet: Fleet, store: Store) -> None:
        self._fleet, self._store = fleet, store

    async def run(
        self, adapter: Adapter, prompts: Sequence[Any], payer: Payer, *, max_tokens: int = 64
    ) -> list[Exchange]:
        """Have `adapter` answer; BadRequest says which prompt it was that the engine did not take.

        `payer` is charged for each prompt as it ends, also where it was in vain.
        """
        room = asyncio.Semaphore(AT_ONCE)
        base = self._fleet.of(adapter.name)
        sequences = min(AT_ONCE, len(prompts))
        async with background_lease(base, self._store, adapter, payer, sequences=sequences) as lease:
            asking = [
                asyncio.create_task(self._ask(lease, room, number, adapter, prompt, max_tokens))
                for number, prompt in enumerate(prompts, 1)
            ]
            try:
                return await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()

    async def _ask(
        self,
        lease: Lease,
        room: asyncio.Semaphore,
        number: int,
        adapter: Adapter,
        prompt: Any,
        max_tokens: int,
    ) -> Exchange:
        question = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        body = {"model": lease.model, "max_tokens": max_tokens, "stream": False, **question}
        if lease.priority is not None:
            body["priority"] = lease.priority
        watch = Watch(logprobs=True, background=True)
        async with room:
            began = time.time()
            path = TEXT if isinstance(prompt, str) else CHAT
            answer = await post(lease, path, body, limit=MAX_ANSWER, watch=watch)
        if answer.status != 200:
            raise BadRequest(f"prompt {number} was answered with {answer.status}: {(answer.body or b'')[:300]!r}")
        generations = watch.read()
        return Exchange(
            adapter.name,
            f"v{adapter.version}",
            200,
            None,
            0.0,
            id=adapter.id,
            tenant=adapter.tenant,
            began=began,
            generations=generations,
            question=question,
        )
