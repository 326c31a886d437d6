"""What is kept of requests as text: to calibrate on, and for adapters that learn from their traffic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from serve.adapters.byte_ledger import ByteLedger
from serve.adapters.registry.registry import Registry
from serve.asgi.exchange import Exchange
from serve.asgi.exchange_worker import ExchangeWorker
from serve.config import Config
from serve.dataset.adapter_traffic import AdapterTraffic
from serve.dataset.capture import QUEUE_SIZE, Capture
from serve.dataset.conversations import Conversations
from serve.dataset.datasets import Datasets
from serve.dataset.deleted_conversations import DeletedConversations
from serve.dataset.feedback import Answered
from serve.engine.fleet import Fleet
from serve.errors import LoradockError
from serve.names import tenant_of
from serve.rollout.golden.golden import Golden
from serve.rollout.policy import Policies

log = logging.getLogger(__name__)

# Between two looks at what was deleted through other servers; a build looks by itself.
DELETIONS_SECONDS = 30.0


class Captures:
    """`model_of` gives an adapter's or base's checkpoint folder. `takes` are to be offered each exchange, behind which
    `worker` writes."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        registry: Registry,
        ledger: ByteLedger,
        golden: Golden,
        policies: Policies,
        model_of: Callable[[str], str],
    ) -> None:
        learning = any(policy.train_on_traffic for policy in policies)
        redact, hours = config.capture_redact, config.capture_hours
        text = Capture(
            config.data_dir / "captured",
            model_of,
            ledger,
            enabled=config.capture_text,
            redact=redact,
            hours=hours,
        )

        def learns(model: str, tenant: str) -> bool:
            """A tenant's own adapters learn of it alone, and of what it asks a base."""
            own = model in fleet or tenant_of(model) == tenant
            return own and policies[model].train_on_traffic

        self.conversations = Conversations(
            config.data_dir / "conversations.db", ledger, learns, enabled=learning, redact=redact, hours=hours
        )
        self.worker = ExchangeWorker([text, self.conversations], name="capture", queue_size=QUEUE_SIZE)
        deleted = DeletedConversations(registry, self.conversations, hours)
        traffic = AdapterTraffic(self.conversations, text, self.worker, registry, fleet, deleted)
        folder = config.data_dir / "datasets"
        self.datasets = Datasets(folder, traffic, ledger, policies, golden.results, registry, config.batch_file_days)
        self.takes: list[Callable[[Exchange], None]] = [self.worker.offer] if config.capture_text or learning else []

    def start(self) -> None:
        """Old files and rows are deleted also where nothing is kept any more. Blocks."""
        self.datasets.start()
        self.worker.start()

    def stop(self) -> None:
        """Blocks."""
        self.worker.stop()

    async def follow_deletions(self) -> None:
        """Delete what was deleted through other servers, until cancelled."""
        while True:
            try:
                await self.datasets.apply_deletions()
            except LoradockError as error:
                log.warning("what was deleted through other servers is not known now: %s", error)
            await asyncio.sleep(DELETIONS_SECONDS)

    async def rated(self, answered: Answered, tenant: str, rating: float | None, answer: str | None) -> None:
        """Write down what somebody said of an answer, behind the request itself; OutOfSpace."""
        if self.takes:
            await asyncio.to_thread(self.worker.settle)
            await asyncio.to_thread(self.conversations.rate, tenant, answered.key, answered.id, rating, answer)
