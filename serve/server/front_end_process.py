"""A process that writes streams into their clients' sockets, as serve.server.front_ends tells it to.

It is a program of its own that imports nothing of the server, so that it starts at once and takes little memory. Pairs
come on its channel, the number of a stream and what is to be done:

    OPEN        a stream begins: the next descriptor on the other socket is a copy of its connection's
    a list      what stands before and behind a text in a chunk of the stream
    a text      is written in such a chunk, as JSON, and the chunk as HTTP has it
    bytes       are written as they are
    GIVE_BACK   what could not be written goes back, and the stream is forgotten
    FORGET      the stream's client has left

Pairs go back: a number and the bytes that were not written, or STUCK for a client that reads too slowly. What comes for
it after that is kept until the stream is given back.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import setproctitle
from pydantic_core import to_json

OPEN, GIVE_BACK = 0, 1
FORGET, STUCK = 2, 3

_HEAD = 4  # bytes that say how long a message is
_READ = 256 << 10
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list).decode


def packed(pairs: list[Any]) -> bytes:
    """A message of pairs, one after the other."""
    message = _encode(pairs)
    return len(message).to_bytes(_HEAD, "big") + message


class Messages:
    """Messages out of the bytes that come on a channel."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> Iterator[list[Any]]:
        data = self._rest + data
        view, begin = memoryview(data), 0
        while len(data) >= begin + _HEAD:
            end = begin + _HEAD + int.from_bytes(view[begin : begin + _HEAD], "big")
            if len(data) < end:
                break
            yield _decode(view[begin + _HEAD : end])
            begin = end
        self._rest = data[begin:]


def framed(head: bytes, text: str, tail: bytes) -> bytes:
    """A chunk with this text, as HTTP has it in the body of an answer."""
    json = to_json(text)
    return b"%x\r\n%b%b%b\r\n" % (len(head) + len(json) + len(tail), head, json, tail)


class Streams:
    """The streams of this process. `answers` are the pairs that go back."""

    def __init__(self, descriptors: socket.socket) -> None:
        self._descriptors = descriptors
        self._files: dict[int, int] = {}
        self._forms: dict[int, tuple[bytes, bytes]] = {}
        # What was not written of those that are stuck.
        self._rests: dict[int, bytes] = {}
        self.answers: list[Any] = []

    def take(self, messages: Iterator[list[Any]]) -> None:
        """Do what they say. Pieces of one stream that come together are written together."""
        pieces: dict[int, bytes] = {}
        for pairs in messages:
            each = iter(pairs)
            for number, what in zip(each, each, strict=True):
                if type(what) is str:
                    head, tail = self._forms[number]
                    what = framed(head, what, tail)
                if type(what) is bytes:
                    pieces[number] = pieces[number] + what if number in pieces else what
                    continue
                if number in pieces:
                    self._write(number, pieces.pop(number))
                self._do(number, what)
        for number, piece in pieces.items():
            self._write(number, piece)

    def _do(self, number: int, what: Any) -> None:
        if isinstance(what, list):
            head, tail = what
            self._forms[number] = head, tail
            return
        if what == OPEN:
            _, files, _, _ = socket.recv_fds(self._descriptors, 1, 1)
            if files:
                self._files[number] = files[0]
            else:  # this process has no more room for descriptors
                self._stick(number, b"")
            return
        rest = self._rests.pop(number, b"")
        self._forms.pop(number, None)
        if number in self._files:
            os.close(self._files.pop(number))
        if what == GIVE_BACK:
            self.answers += (number, rest)

    def _write(self, number: int, piece: bytes) -> None:
        if number in self._rests:
            self._rests[number] += piece
            return
        file = self._files.get(number)
        if file is None:
            return
        try:
            written = os.write(file, piece)
        except BlockingIOError:
            written = 0
        except OSError:  # the client has left, as the server sees too
            return
        if written < len(piece):
            self._stick(number, piece[written:])

    def _stick(self, number: int, rest: bytes) -> None:
        self._rests[number] = rest
        self.answers += (number, STUCK)


def main(channel: socket.socket, descriptors: socket.socket) -> None:
    """Until the server closes the channel."""
    messages, streams = Messages(), Streams(descriptors)
    buffer = bytearray(_READ)
    while count := channel.recv_into(buffer):
        streams.take(messages.take(bytes(memoryview(buffer)[:count])))
        if streams.answers:
            with suppress(OSError):  # a server that ends listens no more, and wants written what it said
                channel.sendall(packed(streams.answers))
            streams.answers.clear()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the server, whose last answers it writes
        signal.signal(number, signal.SIG_IGN)
    setproctitle.setproctitle("loradock: front end")
    gc.disable()  # nothing here refers to itself
    with suppress(ConnectionError):  # a server that was killed
        main(*(socket.socket(fileno=int(word)) for word in sys.argv[1:]))
