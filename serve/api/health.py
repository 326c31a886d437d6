"""Whether a server is up, and what does not work though requests are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.byte_ledger import ByteLedger
from serve.adapters.registry.registry import Registry
from serve.api.background_tasks import BackgroundTasks
from serve.engine.fleet import Fleet
from serve.rollout.registry_sync import RegistrySync
from serve.rollout.swap_follower import SwapFollower


class Health(Collector):
    """`ready` is set once every engine has answered. Without a `follower` nobody shares the registry."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        background: BackgroundTasks,
        follower: RegistrySync | None,
        swap_follower: SwapFollower,
        ledger: ByteLedger,
    ) -> None:
        self.ready = asyncio.Event()
        self._fleet = fleet
        self._registry = registry
        self._background = background
        self._follower = follower
        self._swap_follower = swap_follower
        self._ledger = ledger

    @property
    def degraded(self) -> dict[str, str]:
        """What does not work, though requests are answered, by name. Blocks."""
        problems = self._background.problems
        if full := self._ledger.problem:
            problems["disk"] = full
        if self._registry.standing:
            problems["rollback"] = "a rollback holds on this server and waits for the registry"
        if self._follower and self._follower.problem:
            problems["registry"] = self._follower.problem
        if self._swap_follower.problem:
            problems["base_swap"] = self._swap_follower.problem
        return problems

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "loradock_degraded",
            "1 for each thing that does not work though requests are answered, as /ready names it; none while all do.",
            labels=("what",),
        )
        for what in self.degraded:
            family.add_metric((what,), 1.0)
        yield family

    def check_started(self) -> None:
        """EngineUnavailable while the server starts, and as long as /ready says so."""
        if not self.ready.is_set():
            for base in self._fleet:
                if not base.is_ready:
                    raise base.unavailable()

    def check_registry(self) -> None:
        """EngineUnavailable while this server answers nobody, for it has not seen the registry for too long."""
        if self._follower:
            self._follower.check_age()
