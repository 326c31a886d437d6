"""The one place that decides what a version becomes: stored, held for its golden set, a canary first, or live.

Uploads, runtime LoRA loads, fine-tuning jobs, promotes, held versions with a good score and loops all come here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.errors import Conflict
from serve.rollout import validation
from serve.rollout.canary.canary_monitor import CanaryMonitor
from serve.rollout.golden.golden_verdicts import GoldenVerdicts
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.policy import HOLD, Policies, Policy
from serve.sequential.sequential_test import Verdict


class Place(StrEnum):
    """What a version becomes."""

    STORED = "stored"
    HELD = "waits for golden set"
    UNVALIDATED = "waits for validation"
    CANARY = "canary"
    LIVE = "live"


class VersionAdmission:
    """`policies` has what an adapter's policy says; `Policy.at_once` and `Policy.proven` say less."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        registry: Registry,
        golden: GoldenVerdicts,
        canaries: CanaryMonitor,
        policies: Policies,
    ) -> None:
        self._lifecycle = lifecycle
        self._registry = registry
        self._golden = golden
        self._canaries = canaries
        self.policies = policies

    async def place(self, name: str, *, promote: bool = True, checks: Mapping[str, Any] | None = None) -> Place:
        """What a new version of this name becomes, if it is to be live or not; `checks` are those that came with it."""
        if not promote:
            return Place.STORED
        if validation.problem(checks or {}, self.policies[name].validation):
            return Place.UNVALIDATED
        if await self._golden.holds(name):
            return Place.HELD
        tried = self.policies[name].canary_weight > 0 and self._live(name) is not None
        return Place.CANARY if tried else Place.LIVE

    async def push(
        self, name: str, folder: Path, *, by: str, promote: bool, why: str = "", **more: Any
    ) -> tuple[Adapter, bool]:
        """`Lifecycle.push`, with traffic as the policy has it for what is to be live."""
        place = await self.place(name, promote=promote, checks=more.get("notes"))
        adapter, created = await self._lifecycle.push(name, folder, by=by, promote=place is Place.LIVE, why=why, **more)
        if self._live(name) == adapter.version:
            return adapter, created
        if place is Place.CANARY:
            await self._try(adapter, self.policies[name], by, why)
        elif place is Place.HELD:
            await self._golden.hold(adapter, by, why)
        elif place is Place.UNVALIDATED:
            await self._hold(adapter, by, why, more.get("expected"))
        return adapter, created

    async def admit(
        self, version: Adapter, policy: Policy, by: str, *, why: str = "", expected: int | None = None
    ) -> Place:
        """Make a version that is there live, or a canary first; Conflict, if the policy holds it back.

        `expected` is which version is live by then (0: none): Conflict, if another one is.
        """
        await self.check(version, policy)
        canary, live = self._registry.canary(version.name), self._live(version.name)
        known = live in (None, version.version) or (canary is not None and canary.adapter == version)
        if policy.canary_weight > 0 and not known:
            await self._try(version, policy, by, why, expected)
            return Place.CANARY
        await self._lifecycle.promote(version.name, version.version, by=by, expected=expected, why=why)
        return Place.LIVE

    async def check(self, version: Adapter, policy: Policy) -> None:
        """Conflict, if the policy holds the version back: it did worse as a canary, or its golden score is missing."""
        analysis = self._canaries.analysis(version.name)
        tried = analysis is not None and analysis.canary == version.version
        if analysis is not None and tried and policy.worse == HOLD and analysis.verdict is Verdict.WORSE:
            raise Conflict(
                f"version {version.version} did worse than version {analysis.live} as its canary, and this adapter's "
                'policy holds it back: see its /drift, and promote it with "at_once": true if you want it all the same'
            )
        await self._golden.check(version, policy)
        if bad := validation.problem(version.checks, policy.validation):
            raise Conflict(
                f"version {version.version} {bad}, which this adapter's policy asks for: `loradock adapters validate "
                f'{version.tag}` measures it; or promote it with "at_once": true if you want it all the same'
            )

    async def _hold(self, version: Adapter, by: str, why: str, expected: int | None) -> None:
        """Pushed again it may have been validated meanwhile; otherwise its history says what it waits for."""
        policy = self.policies[version.name]
        if bad := validation.problem(version.checks, policy.validation):
            note = self._registry.note
            await asyncio.to_thread(note, version.name, "validation_hold", version.version, by=by, why=bad)
        else:
            await self.admit(version, policy, by, why=why, expected=expected)

    async def _try(self, version: Adapter, policy: Policy, by: str, why: str, expected: int | None = None) -> None:
        share = (version.name, "canary", version.version, policy.canary_weight)
        await self._lifecycle.share(*share, by=by, why=why, expected=expected)

    def _live(self, name: str) -> int | None:
        live = self._registry.live(name) if name in self._registry else None
        return live.version if live else None
