"""A conversation that was deleted on one server is deleted on all of them, in whatever order the rows are committed."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from serve.adapters.registry.registry import Registry
from serve.dataset.conversations import Captured
from serve.dataset.deleted_conversations import DeletedConversations


def captured(id):
    return Captured(id, "acme", "acme/tone", "v1", 0.0, "anna", f"conversation of {id}", "Hi", "Hello", "stop")


class Kept:
    """What a server keeps of conversations, in place of its file."""

    def __init__(self, *requests):
        self.requests = list(requests)

    def remove(self, tenant, which):
        gone = [one for one in self.requests if which(one)]
        self.requests = [one for one in self.requests if one not in gone]
        return gone


class Slow(Registry):
    """Its transactions wait, before they are committed, until `go` is set."""

    def __init__(self, url):
        super().__init__(url)
        self.written, self.go = threading.Event(), threading.Event()

    @contextmanager
    def adding(self, *alone):
        with super().adding(*alone) as connection:
            yield connection
            self.written.set()
            assert self.go.wait(60)


def test_a_deletion_that_is_committed_after_a_later_one_is_applied_too(url):
    Registry(url).close()  # the tables
    slow, quick, third = Slow(url), Registry(url), Registry(url)
    kept = Kept(captured("early"), captured("late"))
    deleted = DeletedConversations(third, kept, hours=1)
    early = threading.Thread(target=DeletedConversations(slow, Kept(), 1).note, args=("acme", [captured("early")]))
    late = threading.Thread(target=DeletedConversations(quick, Kept(), 1).note, args=("acme", [captured("late")]))
    early.start()
    assert slow.written.wait(60)
    late.start()
    late.join(1)
    deleted.apply()
    slow.go.set()
    early.join()
    late.join()
    deleted.apply()
    assert not kept.requests
    for registry in (slow, quick, third):
        registry.close()
