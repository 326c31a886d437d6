"""The lines of a streamed answer. httpx ends a line at any separator that Unicode has, also within a JSON string."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx


class _Lines:
    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> list[str]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.rstrip(b"\r").decode() for line in whole]


def event_lines(answer: httpx.Response) -> Iterator[str]:
    lines = _Lines()
    for data in answer.iter_bytes():
        yield from lines.add(data)


async def async_event_lines(answer: httpx.Response) -> AsyncIterator[str]:
    lines = _Lines()
    async for data in answer.aiter_bytes():
        for line in lines.add(data):
            yield line
