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

    def __init__(self):
        self.full, self.ids = True, {"a"}

    def forget(self, tenant, ids):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.ids -= set(ids)


def test_a_conversation_whose_text_could_not_be_deleted_is_there_to_be_deleted_again(tmp_path):
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}")
    kept = Conversations(tmp_path / "conversations.db")
    kept.start()
    answer = (Generation([1], [2], "stop", text="Hello"),)
    asked = {"messages": [{"role": "user", "content": "My name is Anna"}]}
    kept.observe(
        Exchange("tone", "v1", 200, 0.1, 0.2, request_id="a", question=asked, generations=answer, tenant="default")
    )
    texts, worker = Texts(), SimpleNamespace(settle=lambda: None)
    fleet = SimpleNamespace(of=lambda adapter: SimpleNamespace(name="base"))
    traffic = AdapterTraffic(kept, texts, worker, registry, fleet, DeletedConversations(registry, kept, hours=24))
    with pytest.raises(OutOfSpace):
        traffic.forget("tone", "", "a")
    texts.full = False
    traffic.forget("tone", "", "a")
    assert not texts.ids and not list(traffic.rows("tone"))
    registry.close()
