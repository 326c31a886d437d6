"""What an engine is about to read of a request, told before anything is computed.

The engine's own app renders it: chat template, tools, roles, an earlier response, whatever field of whichever API. So
what a guard looks at is what the model reads, and no field can be forgotten. The request that is answered afterwards
begins with no other prompt than those that were told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from serve.asgi.exchange import Generation
from serve.asgi.internal_client import render
from serve.engine.supervisor import Supervisor
from serve.errors import BadRequest

# No text of so many tokens is short enough to be looked at.
MAX_TOKENS = 1 << 18


class NothingComputed(BadRequest):
    """A request that was rendered, and goes no further."""


class Reading:
    """One request; `fields` is its body with the base as its model."""

    def __init__(self, base: Supervisor, path: str, fields: Mapping[str, Any]) -> None:
        self._base = base
        self._path = path
        self._fields = fields
        self._prompts: set[tuple[int, ...]] = set()
        self._has_unread = False

    async def text(self) -> str | None:
        """All of its prompts, special tokens too; None if one is none of text."""
        await self._base.available()
        await render(self._base.engine, self._path, self._fields, self._note)
        if self._has_unread or sum(map(len, self._prompts)) > MAX_TOKENS:
            return None
        return await asyncio.to_thread(self._text, sorted(self._prompts))

    def said(self, generations: Sequence[Generation]) -> str:
        """What an answer says, also where it was asked for in tokens."""
        texts = (made.text or (self._text([made.output]) if made.output else "") for made in generations)
        return "\n".join(filter(None, texts))

    def gate(self, prompt: Sequence[int] | None) -> None:
        """BadRequest for a prompt that was not told."""
        if prompt is None or tuple(prompt) not in self._prompts:
            raise BadRequest("the prompt is not the one that this model's guard has looked at: send it again")

    def _note(self, prompt: Sequence[int] | None) -> None:
        if prompt is None:
            self._has_unread = True
        else:
            self._prompts.add(tuple(prompt))
        raise NothingComputed("it was to be rendered alone")

    def _text(self, prompts: Sequence[Sequence[int]]) -> str:
        return "\n".join(map(self._base.backend.text_of, prompts))
