"""Pushed versions that wait for their score on the golden set: they get traffic once it is good enough."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.errors import LoradockError, NotFound
from serve.rollout.golden.golden_results import GoldenResults
from serve.rollout.golden.golden_store import GoldenStore, HeldPromotion
from serve.rollout.policy import Policies, Policy

log = logging.getLogger(__name__)

WHO = "golden"


class Admission(Protocol):
    async def admit(self, version: Adapter, policy: Policy, by: str, *, why: str = "") -> Any:
        """Give the version what traffic the policy says."""


class HeldPromotions:
    """`versions` are those that waited at the last `refresh`."""

    def __init__(
        self,
        store: GoldenStore,
        results: GoldenResults,
        registry: Registry,
        policies: Policies,
        admission: Admission,
    ) -> None:
        self._store = store
        self._results = results
        self._registry = registry
        self._policies = policies
        self._admission = admission
        self._held: Sequence[HeldPromotion] = ()

    @property
    def versions(self) -> set[tuple[str, int]]:
        return {(promotion.name, promotion.version) for promotion in self._held}

    async def refresh(self) -> None:
        """See which versions wait, also by what other servers did."""
        self._held = await asyncio.to_thread(self._store.held)

    async def settle(self) -> None:
        """Give traffic to those whose scores are good enough now, and let the others be."""
        for promotion in self._held:
            try:
                await self._settle(promotion)
            except LoradockError as error:
                log.warning("%s@v%d waits on: %s", promotion.name, promotion.version, error.message)

    async def _settle(self, promotion: HeldPromotion) -> None:
        name, policy = promotion.name, self._policies[promotion.name]
        try:
            adapter = self._registry.get(name, promotion.version)
        except NotFound:
            await asyncio.to_thread(self._store.settle, promotion)
            return
        golden = await asyncio.to_thread(self._results.golden, name)
        if golden is None:
            return
        summary = await asyncio.to_thread(self._results.summary, adapter, golden)
        score = summary.estimate.score or 0.0
        if not summary.complete:
            return
        why = f"golden score {score:.3f} on {summary.estimate.cases} cases"
        if score < policy.golden_min:
            why = f"{why}, and the policy asks for {policy.golden_min:g}"
            log.warning("%s stays without traffic: %s", adapter.tag, why)
            note = self._registry.note
            await asyncio.to_thread(note, name, "golden_hold", adapter.version, by=WHO, why=why)
        elif not (policy.canary_weight > 0 and self._is_canary(adapter)):
            await self._admission.admit(adapter, policy, promotion.who, why=f"{why}; {promotion.why}".rstrip("; "))
        await asyncio.to_thread(self._store.settle, promotion)

    def _is_canary(self, adapter: Adapter) -> bool:
        share = self._registry.canary(adapter.name)
        return share is not None and share.adapter == adapter
