"""Who has series of its own: a bounded number of keys, so that a scrape costs the same however many there are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, KeysView
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
# Seconds between two looks for a place while none is free.
TIDY = 5.0


class Places(Generic[Key]):
    """At most `limit` keys. Those that are only expected give way to those that come.

    `leave` is called with each key that lost its place. For one thread; `in` and `has_room` for any.
    """

    def __init__(self, limit: int, leave: Callable[[Key], None]) -> None:
        self._limit = limit
        self._leave = leave
        self._taken: dict[Key, None] = {}
        # Those of them that may be replaced, the first first.
        self._expected: dict[Key, None] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._taken

    @property
    def is_full(self) -> bool:
        """No place is free, though one that is only expected may be had."""
        return len(self._taken) >= self._limit

    @property
    def has_room(self) -> bool:
        """Whoever comes next gets a place."""
        return not self.is_full or bool(self._expected)

    def keys(self) -> KeysView[Key]:
        return self._taken.keys()

    def take(self, key: Key) -> bool:
        """Whether the key has a place, from now on for good."""
        self._expected.pop(key, None)
        if key in self._taken:
            return True
        if self.is_full:
            if not self._expected:
                return False
            self.drop(next(iter(self._expected)))
        self._taken[key] = None
        return True

    def expect(self, key: Key) -> bool:
        """Whether the key has a place, at least until somebody comes who needs it."""
        if key in self._taken:
            return True
        if self.is_full:
            return False
        self._taken[key] = self._expected[key] = None
        return True

    def release(self, key: Key) -> None:
        """The key keeps its place until somebody comes who needs it."""
        if key in self._taken:
            self._expected[key] = None

    def drop(self, key: Key) -> None:
        """The place is free."""
        self._expected.pop(key, None)
        if key in self._taken:
            del self._taken[key]
            self._leave(key)
