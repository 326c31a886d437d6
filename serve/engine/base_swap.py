"""The swap of a base model under traffic: an engine over another model takes the place of the one that serves.

The new engine starts beside the old one, or after it. It loads the adapters, their effects on both bases are compared,
then requests go to it, and the old one ends with its last answer. Whatever fails, the old model goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from serve.adapters.adapter import Adapter
from serve.engine.effect_probe import Logprobs
from serve.engine.effect_transfer import Effects, Transfer, compared
from serve.engine.engine import Engine
from serve.engine.supervisor import StartedEngine, Supervisor
from serve.errors import ConfigError, Conflict, EngineUnavailable, LoradockError
from serve.models.checkpoint import verify

log = logging.getLogger(__name__)

# Adapters that a refusal names; the others are counted.
NAMED = 5


class Handover(StrEnum):
    """When the new engine starts."""

    BESIDE = "beside"  # while the old one serves: no request waits
    DRAIN_FIRST = "drain_first"  # after the old one has ended: requests wait, and one engine's memory is enough


class Approval(StrEnum):
    """Who says that the adapters may go over."""

    MEASURED = "measured"  # what is measured here: Conflict, if one of them would lose too much of its effect
    FORCED = "forced"  # the operator, whatever is measured
    FOLLOWED = "followed"  # another server, which has measured and recorded it


class SwapStep(StrEnum):
    """How far a swap of the base model is."""

    MEASURING_OLD = "measuring the old"
    STARTING = "starting"
    MEASURING_NEW = "measuring the new"
    WAITING = "waiting for other servers"


class SwapRefused(Conflict):
    """The new base would change what adapters do; `transfers` says which, and by how much."""

    def __init__(self, message: str, transfers: Sequence[Transfer]) -> None:
        super().__init__(message, code="swap_refused")
        self.transfers = transfers

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"]["adapters"] = [transfer.described() for transfer in self.transfers]
        return body


class Pace(Protocol):
    """When servers that share a registry go over to a new model."""

    async def turn(self, base: Supervisor, model: str) -> None:
        """The new engine could serve: returns when it is to."""
        ...

    async def over(self, base: Supervisor) -> None:
        """The swap is done, or failed."""
        ...


@dataclass(frozen=True, slots=True)
class _Measured:
    adapter: Adapter
    effect: Sequence[Logprobs]


async def swap(
    base: Supervisor,
    model: str,
    *,
    by: str,
    approval: Approval = Approval.MEASURED,
    handover: Handover = Handover.BESIDE,
    pace: Pace | None = None,
) -> dict[str, Any]:
    """Put an engine over `model` in the place of the one that serves; what was measured and how long it took.

    With a `pace` a new engine that stands beside the old one serves when it is its turn.
    """
    async with base.replacing():
        began = time.monotonic()
        try:
            await asyncio.to_thread(verify, model)
            transfers = await _Swap(base, base.fresh(model), by, approval, handover, pace).run()
        except ConfigError as error:
            raise Conflict(f"{model} cannot take over, {base.model} goes on: {error}") from error
        finally:
            if pace is not None:
                await pace.over(base)
        seconds = round(time.monotonic() - began, 2)
        log.info("%s is served by %s now, after %.1f s", base.name, model, seconds)
    adapters = [transfer.described() for transfer in transfers]
    return {**base.described(), "seconds": seconds, "adapters": adapters}


class _Swap:
    """One swap, from the engine that serves to a fresh one."""

    def __init__(
        self, base: Supervisor, fresh: Engine, by: str, approval: Approval, handover: Handover, pace: Pace | None
    ) -> None:
        self._base = base
        self._old = base.engine
        self._fresh = fresh
        self._by = by
        self._approval = approval
        self._handover = handover
        self._pace = pace
        self._transfers: list[Transfer] = []

    async def run(self) -> list[Transfer]:
        drain_first = self._handover is Handover.DRAIN_FIRST
        self._step(SwapStep.MEASURING_OLD)
        wanted = self._base.adapters.wanted(self._base)
        before = await self._effects(wanted)
        if not drain_first:
            self._fresh.backend.check_room()
        try:
            if drain_first:
                await self._base.vacate(self._old)
            self._step(SwapStep.STARTING)
            started = await self._base.bring_up(self._fresh)
            try:
                self._step(SwapStep.MEASURING_NEW)
                await self._compare(started, before)
                await self._wait_for_turn()
                await self._take_over(started, {adapter.id for adapter in wanted})
            except BaseException:
                await self._fresh.stop(kill=True)
                raise
        except BaseException:
            if drain_first:
                self._base.bring_back(self._old)
            raise
        if not drain_first:
            self._base.drain(self._old)
        return self._transfers

    async def _wait_for_turn(self) -> None:
        self._check()
        if self._pace is None or self._handover is Handover.DRAIN_FIRST:
            return
        await self._base.adapters.restore(self._base, self._fresh)
        self._step(SwapStep.WAITING)
        await self._pace.turn(self._base, self._fresh.backend.model)

    def _step(self, step: SwapStep) -> None:
        model = self._fresh.backend.model
        self._base.note_swap(model, step)
        log.info("swap of %s to %s: %s", self._base.name, model, step)

    async def _take_over(self, started: StartedEngine, judged: set[str]) -> None:
        """Load, and compare what came meanwhile, until no adapter has changed; then the new engine serves.

        Adapters go on changing while others are measured: no rollback waits for a swap.
        """
        base = self._base
        while True:
            self._check()
            await base.adapters.restore(base, self._fresh)
            async with base.adapters.unchanged():
                late = [adapter for adapter in base.adapters.wanted(base) if adapter.id not in judged]
                if not late:
                    if self._approval is not Approval.FOLLOWED:
                        await base.adapters.record_swap(base, self._fresh.backend.model, self._by)
                    base.serve(started)
                    return
            judged |= {adapter.id for adapter in late}
            if self._handover is Handover.BESIDE:
                await self._compare(started, await self._effects(late))

    def _check(self) -> None:
        problems = [transfer for transfer in self._transfers if transfer.problem]
        if problems and self._approval is Approval.MEASURED:
            raise SwapRefused(_refusal(self._fresh.backend.model, problems), self._transfers)

    async def _effects(self, adapters: Iterable[Adapter]) -> dict[str, _Measured]:
        """What these adapters do on the old base. One that cannot be measured there is a problem of its own. What
        another server has measured is not measured again: engines would have nothing else to do for minutes."""
        if self._approval is Approval.FOLLOWED:
            return {}
        effects = Effects(self._old)
        measured = {}
        for adapter in adapters:
            try:
                path = await self._base.adapters.path(adapter)
                measured[adapter.id] = _Measured(adapter, await effects.of(adapter, path))
            except EngineUnavailable:
                raise
            except LoradockError as error:
                self._transfers.append(Transfer(adapter.tag, problem=f"it cannot be measured: {error}"))
        return measured

    async def _compare(self, started: StartedEngine, before: Mapping[str, _Measured]) -> None:
        """Every adapter that was measured on the old base, on the new one."""
        effects = Effects(started.engine)
        for measured in before.values():
            try:
                self._transfers.append(await self._transfer(started, effects, measured))
            except EngineUnavailable:
                raise
            except LoradockError as error:
                self._transfers.append(Transfer(measured.adapter.tag, problem=str(error)))

    async def _transfer(self, started: StartedEngine, effects: Effects, measured: _Measured) -> Transfer:
        base = self._base
        adapter = measured.adapter
        backend = started.engine.backend
        path = await base.adapters.path(adapter)
        await asyncio.to_thread(base.adapters.check, adapter, backend, started.modules)
        transfer = compared(adapter.tag, measured.effect, await effects.of(adapter, path), base.tolerance)
        if adapter.checks.get("base_model", base.configured) == backend.model:
            transfer = replace(transfer, problem="")  # it was approved on this one
        return transfer


def _refusal(model: str, problems: Sequence[Transfer]) -> str:
    named = "; ".join(f"{transfer.adapter}: {transfer.problem}" for transfer in problems[:NAMED])
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return (
        f"on {model} these adapters would not do what they do now: {named}{more}; train them for it, or force the swap"
    )
