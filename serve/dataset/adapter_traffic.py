"""What an adapter's tenant asked it, as far as it is kept: under each of its names, and what its base was asked too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve.adapters.registry.registry import Registry
from serve.asgi.exchange_worker import ExchangeWorker
from serve.dataset.capture import Capture
from serve.dataset.conversations import Captured, Conversations
from serve.dataset.deleted_conversations import DeletedConversations
from serve.engine.fleet import Fleet
from serve.names import tenant_of


@dataclass(frozen=True, slots=True)
class Span:
    """Requests of a tenant to these adapters and bases, from `since` to before `until`."""

    tenant: str
    models: Collection[str]
    since: float = 0.0
    until: float | None = None


class AdapterTraffic:
    """Over `conversations`, and the texts of `capture`, which `worker` writes. What looks at rows blocks."""

    def __init__(
        self,
        conversations: Conversations,
        capture: Capture,
        worker: ExchangeWorker,
        registry: Registry,
        fleet: Fleet,
        deleted: DeletedConversations,
    ) -> None:
        self._conversations = conversations
        self._capture = capture
        self._worker = worker
        self._registry = registry
        self._fleet = fleet
        self._deleted = deleted

    def names(self, adapter: str) -> list[str]:
        """Its own, and those that it had before."""
        return [adapter, *self._registry.former_names(adapter)]

    def with_base(self, adapter: str) -> list[str]:
        """Its names, and its base's."""
        return [*self.names(adapter), self._fleet.of(adapter).name]

    def listed(self, adapter: str, limit: int) -> list[dict[str, Any]]:
        """The latest conversations, without their texts."""
        return self._conversations.listed(tenant_of(adapter), self.names(adapter), limit)

    def rows(self, adapter: str) -> Iterator[Captured]:
        """What its tenant asked it, the latest first."""
        return self._conversations.rows(tenant_of(adapter), self.names(adapter))

    def within(self, span: Span) -> Iterator[Captured]:
        """The requests, the latest first."""
        return self._conversations.rows(span.tenant, span.models, span.since, span.until)

    def left_out(self, span: Span) -> dict[str, int]:
        """How many requests were not kept, by reason."""
        return self._conversations.left_out(span.tenant, span.models, span.since, span.until)

    def forget(self, adapter: str, key: str, id: str) -> tuple[str, list[Captured]]:
        """Delete a conversation, by its id or that of one of its answers, as whoever has this API key means it: its id,
        and its requests. NotFound."""
        tenant, models = tenant_of(adapter), self.with_base(adapter)
        self._worker.settle()  # a turn that waits to be kept goes with the others
        return self._conversations.forget(tenant, key, models, id, self._note)

    def _note(self, tenant: str, gone: Sequence[Captured]) -> None:
        self._deleted.note(tenant, gone)
        self._forget_text(tenant, gone)

    def _forget_text(self, tenant: str, gone: Sequence[Captured]) -> None:
        """These are about to be deleted; first their texts, which nobody finds without them."""
        self._capture.forget(tenant, [captured.id for captured in gone])

    def apply_deletions(self) -> list[Captured]:
        """Delete what was deleted through other servers; what that was."""
        self._worker.settle()
        return self._deleted.apply(self._forget_text)
