"""Which versions get traffic without being named by their number, and which of them an engine should hold first."""

from __future__ import annotations

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.rollout.prefetch import Popularity


class Traffic:
    def __init__(self, registry: Registry, fleet: Fleet, popularity: Popularity) -> None:
        self._registry = registry
        self._fleet = fleet
        self._popularity = popularity

    def of(self, name: str) -> dict[str, Adapter]:
        """The versions of `name`, by id: pinned, live, canary, shadow, and those that an alias names."""
        reads = self._registry
        shares = [share.adapter for share in (reads.canary(name), reads.shadow(name)) if share]
        serving = (reads.pinned(name), reads.live(name), *shares, *reads.aliases(name).values())
        return {adapter.id: adapter for adapter in serving if adapter}

    def wanted(self, base: Supervisor) -> list[Adapter]:
        """What a fresh engine of this base should hold, the most important first."""
        names = [name for name in self._registry.names() if self._fleet.owner(name) is base]
        pinned = [adapter for name in self.pinned_names(base) if (adapter := self._registry.pinned(name))]
        serving = {adapter.id: adapter for name in names for adapter in self.of(name).values()}
        popular = [serving[adapter_id] for adapter_id in self._popularity.ranked(serving)]
        return list({adapter.id: adapter for adapter in (*pinned, *popular)}.values())

    def pinned_names(self, base: Supervisor) -> list[str]:
        return [name for name in self._registry.pinned_names() if self._fleet.owner(name) is base]

    def pinned(self, base: Supervisor) -> frozenset[str]:
        """The ids that stay in this base's engine."""
        pinned = (self._registry.pinned(name) for name in self.pinned_names(base))
        return frozenset(adapter.id for adapter in pinned if adapter)
