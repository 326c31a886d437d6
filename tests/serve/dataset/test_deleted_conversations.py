"""A conversation that was deleted on one server is deleted on all of them, in whatever order the rows are committed."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from serve.adapters.registry.registry import Registry
from serve.asgi.exchange import Exchange, Generation
from serve.dataset.conversations import Captured, Conversations
from serve.dataset.deleted_conversations import DeletedConversations


def captured(id):
    return Captured(id, "acme", "acme/tone", "v1", 0.0, "anna", f"conversation of {id}", "Hi", "Hello", "stop")


class Kept:
    """What a server keeps of conversations, in place of its file."""

    last_deletion = 0

    def __init__(self, *requests):
        self.requests = list(requests)

    def remove(self, tenant, which, note):
        gone = [one for one in self.requests if which(one)]
        self.requests = [one for one in self.requests if one not in gone]
        return gone

    def note_deletion(self, number):
        self.last_deletion = number


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


def turn(id, *said):
    """A chat of one application's, whose users it does not name: all that begin alike have one asker."""
    question = {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, said[:-1], strict=False)]}
    answer = (Generation([1], [2], "stop", text=said[-1]),)
    known = {"tenant": "acme", "asker": b"Good morning", "began": float(len(id))}
    return Exchange("acme/tone", "v1", 200, 0.1, 0.2, request_id=id, question=question, generations=answer, **known)


ROLES = ("user", "assistant") * 4
GREETING = ("Good morning", "Hello!")


@pytest.fixture
def server(tmp_path, url):
    """A server of the registry, as often as it is started: what it keeps, and what it deletes."""
    registry = Registry(url)

    def start(name):
        kept = Conversations(tmp_path / f"{name}.db")
        kept.start()
        return kept, DeletedConversations(registry, kept, hours=24)

    yield start
    registry.close()


def ids(kept):
    return {row.id for row in kept.rows("acme", ["acme/tone"])}


def test_a_deletion_takes_no_other_conversation_that_begins_alike(server):
    kept, deleted = server("one")
    for id, *more in (("a",), ("b",), ("b2", "Where is my order?", "On its way.")):
        kept.observe(turn(id, *GREETING, *more))
    kept.forget("acme", "", ["acme/tone"], "a", deleted.note)
    deleted.apply()
    assert ids(kept) == {"b", "b2"}


@pytest.mark.parametrize("name", ["one", "other"])
def test_what_is_said_after_a_deletion_outlives_a_restart(server, name):
    kept, deleted = server("one")
    kept.observe(turn("a", *GREETING))
    kept.forget("acme", "", ["acme/tone"], "a", deleted.note)
    kept, deleted = server(name)
    deleted.apply()
    kept.observe(turn("b", *GREETING, "Where is my order?", "On its way."))
    kept.stop()
    kept, deleted = server(name)
    assert deleted.apply() == [] and ids(kept) == {"b"}


def test_another_server_deletes_its_turns_of_the_conversation_once_it_starts_again(server):
    kept, deleted = server("one")
    kept.observe(turn("a", *GREETING))
    there, _ = server("other")
    there.observe(turn("a2", *GREETING, "Where is my order?", "On its way."))
    there.stop()
    kept.forget("acme", "", ["acme/tone"], "a", deleted.note)
    there, deleted_there = server("other")
    assert [row.id for row in deleted_there.apply()] == ["a2"] and ids(there) == set()


@pytest.mark.parametrize("first", ["there", "here"])
def test_another_server_keeps_its_own_conversation_that_begins_alike(server, first):
    kept, deleted = server("one")
    there, deleted_there = server("other")
    own = [(there, "b"), (there, "b2", "And my order?", "Which one?")]
    deleted_here = [(kept, "a"), (kept, "a2", "Where is my order?", "On its way.")]
    for place, id, *more in own + deleted_here if first == "there" else deleted_here + own:
        place.observe(turn(id, *GREETING, *more))
    kept.forget("acme", "", ["acme/tone"], "a", deleted.note)
    assert deleted_there.apply() == [] and ids(there) == {"b", "b2"}


def test_examples_that_an_application_sends_first_are_no_conversation_on_another_server_either(server):
    kept, deleted = server("one")
    there, deleted_there = server("other")
    kept.observe(turn("a", *GREETING, "Where is my order?", "On its way."))
    there.observe(turn("b", *GREETING, "What do you sell?", "Kettles."))
    kept.forget("acme", "", ["acme/tone"], "a", deleted.note)
    assert deleted_there.apply() == [] and ids(there) == {"b"}


def test_all_turns_of_a_conversation_that_went_to_and_fro_are_deleted(server):
    kept, deleted = server("one")
    there, deleted_there = server("other")
    said = [*GREETING, "Where is my order?", "On its way.", "When is it here?", "Tomorrow.", "Thanks", "Bye"]
    for place, id, length in ((there, "1", 2), (kept, "2", 4), (there, "3", 6), (kept, "4", 8)):
        place.observe(turn(id, *said[:length]))
    kept.forget("acme", "", ["acme/tone"], "4", deleted.note)
    for server_deletions in (deleted, deleted_there):
        server_deletions.apply()
    assert ids(kept) == set() and ids(there) == set()
