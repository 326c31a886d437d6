"""What an app may say of the connection that a request came on, if the server has one that listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope

from serve.errors import LoradockError

# Where the server leaves its connection in the scope of a request.
CONNECTION = "loradock.connection"


# Where it leaves the body of the request's answer, if that can be written to without waiting.
BODY = "loradock.body"


class AnswerBody(Protocol):
    """The body of one answer, past the messages of ASGI."""

    @property
    def is_open(self) -> bool:
        """The answer has begun, in pieces, and has not ended, and its client is there."""

    def write(self, piece: bytes) -> None:
        """Send a piece, in order with all that is sent by messages. Call it only while `is_open`."""

    def hand_over(self, cut: Callable[[LoradockError], None]) -> Writer | None:
        """The answer is a long one: who sends what follows, if that is another process now. `cut` ends the answer if
        that process dies."""


class Writer(Protocol):
    """Another process that sends an answer."""

    @property
    def is_there(self) -> bool:
        """It does, and its client reads as fast; once False, that stays."""

    def form(self, head: bytes, tail: bytes) -> None:
        """What stands before and behind each text that is to be said."""

    def say(self, text: str) -> None:
        """Send a text as JSON between these, in order with the pieces of the body."""


class Connection(Protocol):
    def recognise(self) -> None:
        """Whoever sends on this connection showed a key that the server takes, or needs none."""

    @property
    def has_left(self) -> bool:
        """The client closed its side: nobody reads the answer."""


def recognise(scope: Scope) -> None:
    """Say that the caller of this request is known: the connection is not among the first that are closed."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        connection.recognise()


def has_left(scope: Scope) -> bool:
    """Whether the client of this request closed the connection, also where the event loop has not been told yet."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    return connection is not None and connection.has_left
