"""What ends an answer before its time: the engine's failure, the client's own deadline, the client's leave.

vLLM's handlers work in tasks of their own, which go on when their caller is cancelled; they all listen for a client
that leaves. So `CancellableCall` ends a call into an ASGI app by telling the app that its client has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ClientLeft, DeadlineExceeded, LoradockError

# An app that does not listen for its client's leave is cancelled so much later.
PATIENCE = 1.0


class CancellableCall:
    """One call into an ASGI app; `cut(error)` ends it, and `run` raises that error. Nothing is sent after the cut.

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
        # Looked at for each token.
        self.is_cut = False

    def cut(self, error: LoradockError) -> None:
        if not self.is_cut:
            self._error = error
            self.is_cut = True
            self._cut.set()
            if self._running:
                self._limit.reschedule(asyncio.get_running_loop().time() + PATIENCE)

    async def run(self, app: ASGIApp, scope: Scope, send: Send | None = None) -> None:
        """The app's answer, to its end or to the cut; the app gets `send` in place of this call's own."""
        if not self._cut.is_set():
            try:
                async with self._limit:
                    self._running = True
                    await app(scope, self.receive, send or self.send)
            except Exception:
                if not self._cut.is_set():
                    raise
            finally:
                self._running = False
        if self._error is not None:
            try:
                raise self._error
            finally:  # its frames would keep this call, and what came with it, until garbage is collected
                self._error = None

    async def receive(self) -> Message:
        if not self._cut.is_set():
            message = asyncio.ensure_future(self._receive())
            cut = asyncio.ensure_future(self._cut.wait())
            try:
                await asyncio.wait({message, cut}, return_when=asyncio.FIRST_COMPLETED)
                if message.done():
                    return message.result()
            finally:
                cut.cancel()
                message.cancel()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._cut.is_set() and _is_error(message) and (error := self._failing()):
            self.cut(error)
        if not self._cut.is_set():
            try:
                await self._send(message)
            except LoradockError as error:  # raised into the app, it would leave its generators open
                self.cut(error)


class Deadline:
    """A limit in seconds for a whole answer, from now; DeadlineExceeded when it passes. None is no limit.

    `async with` it, and everything in the block is cancelled at the deadline. From `hand_over` on the call is cut
    instead, so that the app ends what it began.
    """

    def __init__(self, seconds: float | None) -> None:
        self._due: float | None = None
        if seconds is not None:
            self._due = asyncio.get_running_loop().time() + seconds
            self._error = DeadlineExceeded(f"X-Request-Timeout: the answer was not whole after {seconds:g} s")
        self._limit = asyncio.timeout_at(self._due)

    async def __aenter__(self) -> Deadline:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise self._error from late

    @contextmanager
    def hand_over(self, call: CancellableCall) -> Iterator[None]:
        """Within the block the deadline cuts `call`."""
        self._limit.reschedule(None)
        if self._due is None:
            yield
            return
        timer = asyncio.get_running_loop().call_at(self._due, call.cut, self._error)
        try:
            yield
        finally:
            timer.cancel()

    def resume(self) -> None:
        """After the call: what is left of the block is cancelled at the deadline again."""
        self._limit.reschedule(self._due)


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Raises ClientLeft if the client leaves before the block ends: whoever waits for a seat holds a place in line."""
    limit = asyncio.timeout(None)

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with limit:
            listening = asyncio.create_task(listen())
            try:
                yield
            finally:
                listening.cancel()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ClientLeft("the client left before it was its turn") from error


def _is_error(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    body: bytes = message.get("body", b"")
    return body.startswith((b'data: {"error"', b"event: error", b"event: response.failed"))
