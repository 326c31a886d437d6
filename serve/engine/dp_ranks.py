"""Which of an engine's data-parallel ranks answers a request: each has its own batch, adapter slots and prefix cache.

A request goes to the rank that computed its beginning before, else to the one that used its adapter last, unless that
rank is much busier than the least busy one, which gets it then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Beginnings of this many characters are remembered, the longest first.
LENGTHS = (8192, 2048, 512, 128)
# Of requests more than the least busy rank that a rank may have and still be preferred, at least and as a part.
SLACK, SLACK_PART = 2, 0.25
REMEMBERED = 16_384
_PROMPTS = ("messages", "prompt", "input", "token_ids")


class DataParallelRanks:
    """Counts the requests of each of `count` ranks. For one event loop."""

    def __init__(self, count: int) -> None:
        self.busy = [0] * count
        self._last: OrderedDict[Hashable, int] = OrderedDict()

    @contextmanager
    def taken(self, adapter: str | None, opening: str) -> Iterator[int | None]:
        """The rank for a request until the block ends; None where there is no choice."""
        if len(self.busy) == 1:
            yield None
            return
        rank = self._choose(adapter, opening)
        self.busy[rank] += 1
        try:
            yield rank
        finally:
            self.busy[rank] -= 1

    def _choose(self, adapter: str | None, opening: str) -> int:
        least = min(self.busy)
        most = least + max(SLACK, least * SLACK_PART)
        keys: list[Hashable] = [(adapter, hash(opening[:size])) for size in LENGTHS if len(opening) >= size]
        keys += [adapter] if adapter else []
        known = (self._last[key] for key in keys if key in self._last)
        rank = next((rank for rank in known if self.busy[rank] <= most), self.busy.index(least))
        for key in keys:
            self._last[key] = rank
            self._last.move_to_end(key)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return rank


def opening(fields: Mapping[str, Any]) -> str:
    """How a request's prompt begins, as far as that tells one from another."""
    prompt = next((fields[name] for name in _PROMPTS if fields.get(name)), "")
    if isinstance(prompt, list):
        parts = (part.get("content") if isinstance(part, Mapping) else part for part in prompt)
        prompt = "\n".join(part if isinstance(part, str) else repr(part) for part in parts)
    return str(prompt)[: LENGTHS[0]]
