"""A version answers prompts that no client sent, so that its baseline is there before its first traffic.

It answers as the shadow does: through vLLM's own app, on a lease, behind every client in the engine's queue; no key is
charged and no series counts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.types import Message, Scope

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.asgi.cancellation import CancellableCall
from serve.asgi.exchange import Exchange, Watch, watching
from serve.engine.engine import LOW_PRIORITY, Engine, Lease
from serve.engine.fleet import Fleet
from serve.errors import BadRequest

AT_ONCE = 8
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

_encode = msgspec.json.Encoder().encode


class BaselineBuild:
    """`run` gives the exchanges, in the order of the prompts; each prompt is a text or a list of chat messages."""

    def __init__(self, fleet: Fleet, store: Store) -> None:
        self._fleet, self._store = fleet, store

    async def run(self, adapter: Adapter, prompts: Sequence[Any], *, max_tokens: int = 64) -> list[Exchange]:
        """Have `adapter` answer; BadRequest says which prompt it was that the engine did not take."""
        room = asyncio.Semaphore(AT_ONCE)
        base = self._fleet.of(adapter.name)
        path = await self._store.bring(adapter.digest)
        await base.available()
        engine = base.engine
        async with engine.lease(adapter.id, path, tenant=adapter.tenant, priority=LOW_PRIORITY) as lease:
            asking = [
                asyncio.create_task(self._ask(engine, lease, room, number, adapter, prompt, max_tokens))
                for number, prompt in enumerate(prompts, 1)
            ]
            try:
                return await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()

    async def _ask(
        self,
        engine: Engine,
        lease: Lease,
        room: asyncio.Semaphore,
        number: int,
        adapter: Adapter,
        prompt: Any,
        max_tokens: int,
    ) -> Exchange:
        said = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        body = {"model": lease.model, "max_tokens": max_tokens, "stream": False, **said}
        if lease.priority is not None:
            body["priority"] = lease.priority
        watch, answer = Watch(logprobs=True, background=True), _Kept()
        async with room:
            began = time.time()
            watching.set(watch)  # this task's alone
            receive, send = answer.ends(body)
            call = CancellableCall(receive, send, engine.failing)
            with engine.alarm(call.cut):
                await call.run(engine.backend.app, _scope(TEXT if isinstance(prompt, str) else CHAT, body))
        if answer.status != 200:
            raise BadRequest(f"prompt {number} was answered with {answer.status}: {answer.body[:300]!r}")
        generations = tuple(sequence.read() for sequence in watch.sequences)
        version = f"v{adapter.version}"
        return Exchange(adapter.name, version, 200, None, 0.0, id=adapter.id, began=began, generations=generations)


class _Kept:
    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def ends(self, body: Mapping[str, Any]) -> tuple[Any, Any]:
        """What the app receives and where it sends to."""
        messages: list[Message] = [{"type": "http.request", "body": _encode(body), "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.body += message.get("body", b"")

        return receive, send


def _scope(path: str, body: Mapping[str, Any]) -> Scope:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_encode(body))).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    rest = {"root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": ("loradock", 80)}
    return {**scope, **rest, "headers": headers, "asgi": {"version": "3.0", "spec_version": "2.3"}, "state": {}}
