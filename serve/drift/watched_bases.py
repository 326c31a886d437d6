"""The drift monitor learns the embedding table of each base model: before the first answer, and after each swap."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from serve.asgi.exchange_worker import ExchangeWorker
from serve.drift.features.kept_embedding import embedding_of
from serve.drift.monitor import DriftMonitor
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import LoradockError
from serve.models.request_text import RequestText

log = logging.getLogger(__name__)


class WatchedBases:
    """The worker starts once there is a base to watch."""

    def __init__(self, fleet: Fleet, drift_monitor: DriftMonitor, worker: ExchangeWorker, cache: Path) -> None:
        self._fleet = fleet
        self._drift_monitor = drift_monitor
        self._worker = worker
        self._cache = cache
        # By base: the model whose table was read, or has none that could be.
        self._learned: dict[str, str] = {}

    async def run(self) -> None:
        """Until cancelled: learn each model that is swapped in."""
        async with asyncio.TaskGroup() as group:
            for base in self._fleet:
                group.create_task(self._follow(base))

    async def learn(self, models: Mapping[str, str]) -> None:
        """Watch the versions over these models from now on, by base."""
        for base, model in models.items():
            if self._learned.get(base) != model:
                await asyncio.to_thread(self._learn, base, model)

    async def _follow(self, base: Supervisor) -> None:
        while True:
            engine = base.engine
            await self.learn({base.name: engine.backend.model})
            await base.replaced(engine)

    def _learn(self, base: str, model: str) -> None:
        self._drift_monitor.pause(base)
        self._learned[base] = model
        try:
            embedding = embedding_of(Path(model), self._cache)
            tokenizer = Path(model) / "tokenizer.json"
            digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else ""
        except (LoradockError, OSError) as error:
            log.warning("drift is not watched for %s: %s", base, error)
            return
        self._drift_monitor.learn(base, embedding, digest, RequestText(Path(model)))
        self._worker.start()
