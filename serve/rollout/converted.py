"""An adapter of another kind between its upload and its inspection: made a LoRA, and what that left out is measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi.concurrency import contextmanager_in_threadpool

from serve.adapters.adapter import Limits
from serve.adapters.byte_ledger import Kind
from serve.adapters.conversion.conversion import Conversion, convert, written_bytes
from serve.adapters.conversion.kinds import convertible
from serve.adapters.store import Store
from serve.names import tenant_of
from serve.rollout.candidate import Candidate


@asynccontextmanager
async def as_lora(
    store: Store, name: str, folder: Path, modules: Mapping[str, tuple[int, int]], limits: Limits
) -> AsyncIterator[tuple[Path, Conversion | None]]:
    """The folder itself, if it is a LoRA; else one with the LoRA that it becomes, there until the block ends."""
    settings = await asyncio.to_thread(convertible, folder)
    if settings is None:
        yield folder, None
        return
    with store.ledger.room(tenant_of(name), Kind.UNPACKED) as room:
        await asyncio.to_thread(room.expect, written_bytes(settings, modules, limits))
        async with contextmanager_in_threadpool(store.quarantine(room)) as aside:
            yield aside, await convert(folder, aside, settings, modules, limits)


async def measured(new: Candidate) -> dict[str, Any]:
    """The facts of a conversion, with what the part that was left out does on the probe's prompts, by itself."""
    assert new.conversion
    facts = dict(new.conversion.facts)
    remainder, base = new.conversion.remainder, new.base
    if base.probe is None or remainder is None:
        return facts
    adapter_id = f"{new.id}-remainder"
    try:
        moved = await base.probe.moved(adapter_id, remainder)
    finally:
        base.engine.retire(adapter_id)
    return facts if moved is None else {**facts, "left_out_effect": round(moved, 4)}
