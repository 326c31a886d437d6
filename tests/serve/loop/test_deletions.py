"""What is deleted while a loop gathers is in nothing that it writes then."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from serve.loop.deletions import Deletions
from serve.loop.likelihood import Example
from tests.serve.loop.conftest import asked, loop_of, parts_of, pushed, tried


async def trained_on(client, attempt):
    job = (await client.get(f"/v1/fine_tuning/jobs/{attempt['job']}")).json()
    lines = (await client.get(f"/v1/files/{job['training_file']}/content")).text.splitlines()
    return [Example(json.loads(line)) for line in lines]


async def references_of(client):
    rows = parts_of(client).loops.rows
    found = [
        await asyncio.to_thread(rows.references.examples, one["id"]) for one in (await loop_of(client))["references"]
    ]
    return [example for examples in found for example in examples]


async def test_what_is_deleted_meanwhile_is_in_no_file_and_no_reference(looping, make_adapter):
    plain, gone = looping.traffic, []
    looping.scores.of = lambda version, word: 0.9 if version > 1 and (word == "new" or version > 2) else 0.3

    async def gather(name, **span):
        gathered = await plain(name, **span)
        held_out = [replace(one, conversation=f"conv-{at}") for at, one in enumerate(gathered.held_out)]
        gone.extend([gathered.train[0], held_out[0]])
        lines = [one.fields for one in gone if not one.conversation]
        await asyncio.to_thread(parts_of(client).loops.forget_conversation, "default", "conv-0", lines)
        return replace(gathered, held_out=held_out)

    looping.traffic = gather
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        first = await tried(client)
        lines = await trained_on(client, first)
        assert first["outcome"] == "promoted" and (len(lines), first["data"]["new"]) == (29, 29)
        held_out = await references_of(client)
        assert len(held_out) == 29 and not {one.digest for one in gone} & {one.digest for one in [*lines, *held_out]}
        # The next try makes its first reference of that file, of which a line is deleted then too.
        (reference,) = (await loop_of(client))["references"]
        await client.delete(f"/v1/adapters/tone/loop/references/{reference['id']}")
        gone.append(min(lines, key=lambda one: one.digest))
        plain.word = "newer"
        await asked(client, "run")
        second = await tried(client, 2)
        written = [*await trained_on(client, second), *await references_of(client)]
        assert second["data"]["new"] == 29 and len(await references_of(client)) > 10
        assert not {one.digest for one in gone} & {one.digest for one in written}


async def test_what_was_deleted_before_is_neither_replayed_nor_in_a_first_reference(looping, make_adapter):
    looping.scores.of = lambda version, word: 0.9 if version > 1 and (word == "new" or version > 2) else 0.3
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        lines = await trained_on(client, await tried(client))
        (reference,) = (await loop_of(client))["references"]
        await client.delete(f"/v1/adapters/tone/loop/references/{reference['id']}")
        gone, others = lines[:5], lines[5:]
        loops = parts_of(client).loops
        for tenant, some in (("default", gone), ("acme", others), ("default", gone[:1])):
            await asyncio.to_thread(loops.forget_conversation, tenant, "conv-0", [one.fields for one in some])
        looping.traffic.word = "newer"
        await asked(client, "run")
        trained = await trained_on(client, await tried(client, 2))
        written = {one.digest for one in [*trained, *await references_of(client)]}
        assert written >= {one.digest for one in others} and not written & {one.digest for one in gone}


def test_only_what_a_tenant_deletes_while_it_is_watched_counts():
    deletions, example = Deletions(), Example({"prompt": "a", "completion": "b"})
    deletions.add("acme", "conv-1", {example.digest})
    with deletions.watched("acme") as mine, deletions.watched("other") as other:
        assert not mine.has(example)
        deletions.add("acme", "conv-1", {example.digest})
        assert mine.has(example) and mine.has(Example({}, "conv-1")) and not other.has(example)
        assert not mine.has(Example({}, "conv-2"))
