"""Training data out of an adapter's captured traffic. A tenant's requests are its own, also for operators."""

import asyncio
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request

from serve.adapters.adapter import Adapter
from serve.api.captures import Captures
from serve.api.deletion import DELETE
from serve.api.json_body import JsonBody
from serve.api.parts import (
    TheCaptures,
    TheDeletion,
    TheFiles,
    TheGolden,
    TheMessages,
    TheMeters,
    ThePolicies,
    TheRegistry,
)
from serve.api.routes.callers import Manager, OneAdapter, TheAdapter, paying
from serve.api.schemas import DataBuild, Replay
from serve.auth.auth import Caller
from serve.auth.rate_limits import Meters
from serve.dataset.build import Built, Options
from serve.dataset.replay import Replayed, chosen, replay, report
from serve.engine.payer import Cause
from serve.errors import Conflict, Forbidden, NotFound
from serve.fleet.server_messages import Content
from serve.jobs.batches.files import Files
from serve.names import short_name, shown, tenant_of
from serve.rollout.golden.golden import Golden

router = APIRouter()
# Captured requests of which those to replay are taken, the latest.
LOOKED_AT = 10_000


@router.post("/v1/adapters/{name:path}/data")
async def build_data(
    caller: Manager,
    adapter: TheAdapter,
    captures: TheCaptures,
    stored_files: TheFiles,
    body: Annotated[DataBuild, JsonBody(DataBuild, required=False)],
) -> dict[str, Any]:
    """Make files of examples out of what was asked of an adapter that learns from its traffic.

    `training_file`, `validation_file` and `preferences_file` are files of the tenant's with the purpose `fine-tune`, or
    null where there is no such example; `card` says how much came from where, and what was dropped.
    """
    full = _own(adapter)
    wanted = {field: value for field, value in msgspec.structs.asdict(body).items() if field != "bases"}
    options = Options(full, caller.tenant, **wanted)
    datasets = captures.datasets
    with datasets.alone("build", caller.tenant):
        async with datasets.folder(caller.tenant) as (folder, room):
            built = await datasets.build(options, folder, room, bases=body.bases)
            files = await asyncio.to_thread(_adopted, stored_files, caller, built)
    return {"object": "data.build", "name": adapter.name, **files, "card": built.described}


@router.get("/v1/adapters/{name:path}/data/conversations")
async def conversations(
    adapter: TheAdapter, captures: TheCaptures, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, Any]:
    """The latest captured conversations with an adapter: ids, numbers and times, without what was said."""
    full = _own(adapter)
    datasets = captures.datasets
    rows = await asyncio.to_thread(datasets.traffic.listed, full, limit)
    return {"object": "list", "learns": datasets.learns(full), "data": rows}


@router.get("/v1/adapters/{name:path}/data/progress")
async def progress(adapter: TheAdapter, captures: TheCaptures) -> dict[str, Any]:
    """How far the build of an adapter's data is; `doing` is null while there is none."""
    doing, done, of = captures.datasets.progress(_own(adapter)) or (None, 0, 0)
    return {"object": "data.progress", "doing": doing, "done": done, "of": of}


@router.delete("/v1/adapters/{name:path}/data/conversations/{id}")
async def delete_conversation(
    id: str,
    caller: Manager,
    adapter: TheAdapter,
    deletion: TheDeletion,
    messages: TheMessages,
) -> dict[str, Any]:
    """Delete a captured conversation, by its id or that of one of its answers; no later build has any of it, and no
    reference of a loop. Each server that kept some of it deletes it before it builds, and within a minute."""
    adapter.about(f" {shown(id)}")
    full = _own(adapter)
    gone: Content | None
    try:
        gone = await deletion.delete(full, caller.key, id)
    except NotFound:
        gone = await messages.ask(DELETE, {"adapter": full, "key": caller.key, "id": id}) if messages else None
        # A reference may hold it longer than it is kept.
        if gone is None and not await deletion.delete_referenced(full, id):
            raise
    return {"id": id, "object": "data.conversation", "deleted": True, "requests": 0, **(gone or {})}


@router.post("/v1/adapters/{name:path}/versions/{number}/replay")
async def replay_version(
    number: int,
    request: Request,
    caller: Manager,
    adapter: TheAdapter,
    registry: TheRegistry,
    policies: ThePolicies,
    golden: TheGolden,
    captures: TheCaptures,
    meters: TheMeters,
    body: Annotated[Replay, JsonBody(Replay, required=False)],
) -> dict[str, Any]:
    """Have a version answer captured requests of its adapter, in the gaps of traffic, and compare what it says.

    `agreement` is by words with the `kept` answers, or with those of the `live` version; `ratings` says between which
    bounds the version's mean rating lies; `judge` grades both, if the golden set has one for shadows; `examples` are
    those that differ most. Takes as long as the answers do; nothing of it is kept.
    """
    adapter.about(f"@v{number}")
    full = _own(adapter)
    await captures.datasets.apply_deletions()
    version = registry.get(full, number)
    live = registry.live(full) if body.against == "live" else None
    if body.against == "live" and (live is None or live == version):
        raise Conflict("there is no other version that is live: compare with the kept answers", param="against")
    with captures.datasets.alone("replay", caller.tenant):
        replayed, refused = await _replayed(golden, captures, meters, request, caller, version, live, body)
    shown_examples = 0 if policies[full].guard.withholds else body.examples
    compared = await asyncio.to_thread(report, replayed, refused, shown_examples)
    return {"object": "replay", "name": adapter.name, "version": number, "against": body.against, **compared}


async def _replayed(
    golden_sets: Golden,
    captures: Captures,
    meters: Meters,
    request: Request,
    caller: Caller,
    version: Adapter,
    live: Adapter | None,
    body: Replay,
) -> tuple[list[Replayed], Counter[str]]:
    full = version.name
    rows = await asyncio.to_thread(
        lambda: chosen(islice(captures.datasets.traffic.rows(full), LOOKED_AT), body.requests)
    )
    if not rows:
        name = short_name(full, caller.tenant)
        raise Conflict(f"no request to {name} is kept: its policy has to say `train_on_traffic: true` for that")
    golden = await asyncio.to_thread(golden_sets.results.golden, full)
    judge = golden.shadow.judge if golden and golden.shadow else None

    async def goes_on() -> bool:
        return not await request.is_disconnected()

    with paying(meters, caller, Cause.REPLAY) as payer:
        return await replay(
            golden_sets.runner,
            version,
            rows,
            against=live,
            max_tokens=body.max_tokens,
            judge=judge,
            payer=payer,
            goes_on=goes_on,
        )


def _own(adapter: OneAdapter) -> str:
    full = adapter.full
    if (tenant := tenant_of(full)) != adapter.caller.tenant:
        name = shown(adapter.name)
        raise Forbidden(f"what {name} was asked is seen by keys of its own tenant alone: take a key of {tenant}")
    return full


def _adopted(stored_files: Files, caller: Caller, built: Built) -> dict[str, str | None]:
    """The ids of the tenant's files."""

    def adopted(path: Path | None) -> str | None:
        if path is None:
            return None
        filename = f"{built.described['adapter'].rpartition('/')[2]}-{path.name}"
        return stored_files.adopt(caller, path, filename).id

    files = {"training": built.train, "validation": built.held_out, "preferences": built.preferences}
    return {f"{kind}_file": adopted(path) for kind, path in files.items()}
