"""The body of a request: read from the socket up to a bound, and handed on to whoever reads it next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Message, Receive

from serve.errors import ClientLeft, TooLarge
from serve.names import shown


async def read(
    receive: Callable[[], Awaitable[Message]],
    headers: Mapping[str, str],
    limit: int,
    path: str,
    take: Callable[[int], None] = lambda nbytes: None,
) -> bytes:
    """The whole body; TooLarge as soon as it states or has more, ClientLeft if the client left before its end.

    `take(nbytes)` hears of each piece that is kept, and may refuse it.
    """
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > limit:
        raise _too_large(path, limit)
    chunks = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("the client left before its request was whole")
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise _too_large(path, limit)
        take(len(piece))
        chunks.append(piece)
        more = message.get("more_body", False)
    return b"".join(chunks)


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request with this body; then it tells when the client leaves."""
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        message = await receive()
        while message["type"] != "http.disconnect":
            message = await receive()
        return message

    return replay


def _too_large(path: str, limit: int) -> TooLarge:
    return TooLarge(f"the request body is above {limit >> 10} KiB, the most that {shown(path, 200)} takes")
