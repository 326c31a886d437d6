"""The bytes of request bodies that are in memory, by tenant: from their first byte until their request has ended.

A connection costs little and a body may be large: without a bound, who sends all of a body but its last byte, on as
many connections as there are, holds more memory than a machine has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.errors import Overloaded

# Several of the largest bodies, on a machine with little memory too; else this part of it.
FEWEST, PART = 256 << 20, 16


class BodyMemory:
    """`most` is what the bodies of one tenant may have together."""

    def __init__(self, most: int = FEWEST) -> None:
        self._most = max(FEWEST, most)
        self._held = Counter[str]()

    @contextmanager
    def held(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """The body of one request: call it with each piece's size. Overloaded, where there is no room for a piece."""
        mine = 0

        def take(nbytes: int) -> None:
            nonlocal mine
            if self._held[tenant] + nbytes > self._most:
                raise Overloaded(
                    f"the requests of this tenant that are under way have {self._held[tenant] >> 20} MiB, and "
                    f"{self._most >> 20} MiB are the most: send this one when some of them have ended",
                    retry_after=1,
                )
            self._held[tenant] += nbytes
            mine += nbytes

        try:
            yield take
        finally:
            self._held[tenant] -= mine
            if not self._held[tenant]:
                del self._held[tenant]
