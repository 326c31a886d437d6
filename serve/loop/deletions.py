"""Conversations that are deleted while a try's examples are gathered: what is written then has none of them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from serve.loop.likelihood import Example


class Deleted:
    """What of a tenant's was deleted since `Deletions.watched` began."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.conversations: set[str] = set()
        self.digests: set[str] = set()

    def has(self, example: Example) -> bool:
        return example.conversation in self.conversations or example.digest in self.digests


class Deletions:
    """One for all loops of this server, which captured what they gather.

    A deletion comes either before something is written, which then leaves it out, or after, and takes it out again.
    """

    def __init__(self) -> None:
        self.writing = threading.Lock()
        self._watching: list[Deleted] = []

    @contextmanager
    def watched(self, tenant: str) -> Iterator[Deleted]:
        """While examples are gathered and written; with `writing` nothing is added to it."""
        deleted = Deleted(tenant)
        self._watching.append(deleted)
        try:
            yield deleted
        finally:
            self._watching.remove(deleted)

    def add(self, tenant: str, conversation: str, digests: Collection[str]) -> None:
        """This was deleted. Blocks."""
        with self.writing:
            for deleted in tuple(self._watching):
                if deleted.tenant == tenant:
                    deleted.conversations.add(conversation)
                    deleted.digests.update(digests)
