"""A call into an ASGI app that can be ended from outside, in the app's own language: its client has left.

vLLM's handlers do their work in tasks of their own, which a cancelled caller leaves running; a client that leaves is
what they all listen for. Nothing that the app says after the cut is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import LoradockError

# An app that does not listen for its client's leave is cancelled so much later.
PATIENCE = 1.0


class CancellableCall:
    """One call; `cut(error)` ends it, and whoever runs it hears `error`.

    `failing` is asked when the app is about to answer with an error of its own: the error that it comes from, if the
    engine behind it is gone.
    """

    def __init__(self, receive: Receive, send: Send, failing: Callable[[], LoradockError | None]) -> None:
        self._receive = receive
        self._send = send
        self._failing = failing
        self._error: LoradockError | None = None
        self._cut = asyncio.Event()
        self._limit = asyncio.timeout(None)
        self._running = False

    def cut(self, error: LoradockError) -> None:
        if self._error is None:
            self._error = error
            self._cut.set()
            if self._running:
                self._limit.reschedule(asyncio.get_running_loop().time() + PATIENCE)

    async def run(self, app: ASGIApp, scope: Scope, send: Send | None = None) -> None:
        """The app's answer, to its end or to the cut; `send` stands before ours."""
        if self._error is None:
            try:
                async with self._limit:
                    self._running = True
                    await app(scope, self.receive, send or self.send)
            except Exception:
                if self._error is None:
                    raise
            finally:
                self._running = False
        if self._error is not None:
            raise self._error

    async def receive(self) -> Message:
        if not self._cut.is_set():
            heard = asyncio.ensure_future(self._receive())
            cut = asyncio.ensure_future(self._cut.wait())
            try:
                await asyncio.wait({heard, cut}, return_when=asyncio.FIRST_COMPLETED)
                if heard.done():
                    return heard.result()
            finally:
                cut.cancel()
                heard.cancel()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._error is None and _is_error(message) and (error := self._failing()):
            self.cut(error)
        if self._error is None:
            try:
                await self._send(message)
            except LoradockError as error:  # raised into the app, it would leave its generators open
                self.cut(error)


def _is_error(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    body: bytes = message.get("body", b"")
    return body.startswith((b'data: {"error"', b"event: error", b"event: response.failed"))
