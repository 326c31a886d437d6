"""Lets a client go that neither sends nor reads for too long: it holds a connection, and a seat with the engine."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from serve.asgi.fast_stream import FLOW, Flow
from serve.errors import ClientTooSlow


class PacedConnection:
    """A client's connection; `read` and `send` raise ClientTooSlow after `seconds` without progress."""

    __slots__ = ("_flow", "_receive", "_seconds", "_send")

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self._flow: Flow | None = scope.get("extensions", {}).get(FLOW)
        self._receive = receive
        self._send = send
        self._seconds = seconds

    @property
    def receive(self) -> Receive:
        """The next message from the client, without a limit: once its request is whole, it may stay silent."""
        return self._receive

    async def read(self) -> Message:
        """A piece of the request's body."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._receive()
        except TimeoutError as error:
            raise ClientTooSlow(f"no more of the request came for {self._seconds:g} s: send it again") from error

    async def send(self, message: Message) -> None:
        if self._flow is not None and not self._flow.write_paused:  # then the send below does not wait
            await self._send(message)
            return
        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                await self._send(message)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ClientTooSlow(f"the client read nothing of its answer for {self._seconds:g} s") from error
