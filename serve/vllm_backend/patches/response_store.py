"""Bounds for what vLLM keeps of the Responses API, which by itself forgets nothing.

vLLM keeps responses in the server's memory if VLLM_ENABLE_RESPONSES_API_STORE=1, for `previous_response_id` and
GET /v1/responses/ID: the response, its messages, and the events of one that is made in the background. Here the oldest
of whoever keeps the most go first, so that one tenant's responses do not push out another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import msgspec

ENTRIES, BYTES = 1000, 256 << 20

_encode = msgspec.json.Encoder(enc_hook=str).encode


class _Store(dict[str, Any]):
    def __init__(self, added: Callable[[str, Any], None]) -> None:
        self._added = added

    def __setitem__(self, id: str, value: Any) -> None:
        super().__setitem__(id, value)
        self._added(id, value)


class ResponseStores:
    """Three dictionaries of responses, messages and events by response id, with one bound: an id is in all or in none.

    `owner` says from an id which ids have the same one; `entries` and `nbytes` are what all owners keep together.
    """

    def __init__(self, owner: Callable[[str], str], entries: int = ENTRIES, nbytes: int = BYTES) -> None:
        self.responses, self.messages, self.events = (_Store(self._count) for _ in range(3))
        self._owner = owner
        self._entries = entries
        self._bytes = nbytes
        # By id, the one that changed last at the end.
        self._sizes: dict[str, int] = {}

    def _count(self, id: str, value: Any) -> None:
        self._sizes[id] = self._sizes.pop(id, 0) + _size(value)
        while len(self._sizes) > self._entries or sum(self._sizes.values()) > self._bytes:
            self._forget()

    def _forget(self) -> None:
        kept: Counter[str] = Counter()
        for id, size in self._sizes.items():
            # An entry counts by its part of either bound.
            kept[self._owner(id)] += 1 + size * self._entries // self._bytes
        most = kept.most_common(1)[0][0]
        oldest = next(id for id in self._sizes if self._owner(id) == most)
        del self._sizes[oldest]
        for store in (self.responses, self.messages, self.events):
            store.pop(oldest, None)


def bound(serving: Any, owner: Callable[[str], str]) -> bool:
    """Put bounded stores in the place of vLLM's; whether it keeps anything. `serving` is None for a pooling model."""
    if serving is None or not serving.enable_store:
        return False
    stores = ResponseStores(owner)
    serving.response_store = stores.responses
    serving.msg_store = stores.messages
    serving.event_store = stores.events
    serving.retrieve_responses = partial(_retrieved, serving, serving.retrieve_responses)
    serving.responses_background_stream_generator = partial(_events, serving)
    serving._render_resolved_response_inputs = partial(_rendered, serving, serving._render_resolved_response_inputs)
    return True


async def _retrieved(serving: Any, original: Callable[..., Any], id: str, starting_after: Any, stream: Any) -> Any:
    """vLLM's, which raises behind the head of a 200 where there are no events."""
    if stream and id in serving.response_store and id not in serving.event_store:
        return serving.create_error_response(
            f"{id} has no events: it was not asked with `stream` and `background`; GET it without `stream`",
            param="stream",
        )
    return await original(id, starting_after=starting_after, stream=stream)


async def _events(serving: Any, id: str, starting_after: int | None = None) -> AsyncGenerator[Any, None]:
    """vLLM's, which waits for ever for the end of a response that was cancelled or has failed."""
    events, changed = serving.event_store[id]
    next_event = 0 if starting_after is None else max(0, starting_after + 1)
    while True:
        changed.clear()
        while next_event < len(events):
            yield events[next_event]
            next_event += 1
        task = serving.background_tasks.get(id)
        if task is None or task.done():
            return
        await changed.wait()


async def _rendered(
    serving: Any, original: Callable[..., Any], request: Any, previous: Any, *args: Any, **named: Any
) -> Any:
    """vLLM's, which leaves out an answer that is not there, and goes on as if nothing had been said."""
    if previous is not None and previous.status not in ("completed", "incomplete"):
        return serving.create_error_response(
            f"the response {previous.id} is {previous.status}: only one that has an answer can be gone on from",
            param="previous_response_id",
        )
    return await original(request, previous, *args, **named)


def _size(value: Any) -> int:
    """About how many bytes a response or its messages take; nothing for events, which come later."""
    return 0 if isinstance(value, tuple) else len(_encode(value))
