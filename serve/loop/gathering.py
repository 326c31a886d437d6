"""New examples out of an adapter's captured traffic, as its data builds make them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from serve.dataset.build import Options
from serve.dataset.datasets import Datasets
from serve.loop.examples import Gather, Gathered, read
from serve.loop.likelihood import Example
from serve.names import tenant_of

# Conversations of each asker, on average, above which askers are taken for applications, as of a canary.
APPLICATION = 4


def gathering(datasets: Datasets) -> Gather:
    """Over the builds of this server, which has the traffic that it answered itself."""

    async def gather(name: str, *, since: float, until: float, held_out: float, seed: int) -> Gathered:
        options = Options(name, tenant_of(name), since, until, held_out=held_out, seed=seed)
        async with datasets.folder(options.tenant) as (folder, room):
            built = await datasets.build(options, folder, room)
            train, held = [await asyncio.to_thread(_read, path) for path in (built.train, built.held_out)]
        # A reference forgets what its client has deleted.
        ids = [conversation for conversation, _ in built.kept_apart]
        named = zip(held, ids, clusters(ids, built.held_out_askers), strict=True)
        held = [replace(example, conversation=id, cluster=cluster) for example, id, cluster in named]
        card = built.described
        evidence = {"captured": card["captured"], "dropped": card["dropped"], "digests": built.digests}
        return Gathered(train, held, {**evidence, "sources": card["sources"], "askers": card["askers"]})

    return gather


def clusters(conversations: Sequence[str], askers: Sequence[str]) -> Sequence[str]:
    """Which examples count as one: those of an asker; of a conversation where so many come from so few that an asker is
    an application."""
    few = len(set(askers)) * APPLICATION < len(set(conversations))
    return conversations if few else askers


def _read(path: Path | None) -> list[Example]:
    return [] if path is None else read(path)
