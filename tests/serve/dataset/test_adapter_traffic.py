"""What an adapter was asked is deleted everywhere where it is kept, or nowhere."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from serve.adapters.registry.registry import Registry
from serve.asgi.exchange import Exchange, Generation
from serve.dataset.adapter_traffic import AdapterTraffic
from serve.dataset.conversations import Conversations
from serve.dataset.deleted_conversations import DeletedConversations
from serve.errors import OutOfSpace


class Texts:
    """Of captured requests, on a disk that is full at first."""

    def __init__(self, id):
        self.full, self.ids = True, {id}

    def forget(self, tenant, ids):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.ids -= set(ids)


MESSAGE = {"role": "user", "content": "My name is Anna"}


@pytest.fixture
def server(tmp_path):
    """Of one registry, with one answer by this id, after what was said `earlier`: what it keeps, and where its texts
    are."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}")

    def made(id, *earlier):
        kept = Conversations(tmp_path / f"{id}.db")
        kept.start()
        answer = (Generation([1], [2], "stop", text="Hello"),)
        asked = {"messages": [*earlier, MESSAGE]}
        named = {"request_id": id, "tenant": "default", "asker": b"anna"}
        kept.observe(Exchange("tone", "v1", 200, 0.1, 0.2, question=asked, generations=answer, **named))
        texts, worker = Texts(id), SimpleNamespace(settle=lambda: None)
        fleet = SimpleNamespace(of=lambda adapter: SimpleNamespace(name="base"))
        deleted = DeletedConversations(registry, kept, hours=24)
        return AdapterTraffic(kept, texts, worker, registry, fleet, deleted), texts

    yield made
    registry.close()


def test_a_conversation_whose_text_could_not_be_deleted_is_there_to_be_deleted_again(server):
    traffic, texts = server("a")
    with pytest.raises(OutOfSpace):
        traffic.forget("tone", "", "a")
    texts.full = False
    traffic.forget("tone", "", "a")
    assert not texts.ids and not list(traffic.rows("tone"))


def test_what_was_deleted_elsewhere_is_deleted_once_it_can_be(server):
    (here, texts), (there, its_texts) = server("a"), server("b", MESSAGE, {"role": "assistant", "content": "Hello"})
    texts.full = False
    here.forget("tone", "", "a")
    with pytest.raises(OutOfSpace):
        there.apply_deletions()
    its_texts.full = False
    there.apply_deletions()
    assert not its_texts.ids and not list(there.rows("tone"))
