"""Adapters: push, look, and every change to what is live."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serve.adapters.registry.registry import Registry
from serve.api.incoming import received, stated_bytes
from serve.api.json_body import JsonBody
from serve.api.parts import (
    TheAdmission,
    TheAuto,
    TheConfig,
    TheFleet,
    TheGolden,
    TheHealth,
    TheIncoming,
    TheLifecycle,
    ThePolicies,
    TheRecent,
    TheRegistry,
    TheRemoval,
)
from serve.api.routes.callers import Expected, Manager, OneAdapter, TheAdapter, agreed, described, summary
from serve.api.schemas import Pin, Promote, Rename, Rollback, Visibility, Weight
from serve.auth.auth import Caller
from serve.engine.fleet import Fleet
from serve.gateway.auto import Auto
from serve.gateway.router import manages
from serve.names import check_name, full_name, short_name, spelled, tenant_of
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.rename import rename as give_name

router = APIRouter()
MOST_LISTED = 1000  # of one page
LISTED_AT_ONCE = 50  # a few milliseconds


@router.post(
    "/v1/adapters",
    status_code=201,
    responses={200: {"description": "These bytes are a version already, or it was a dry run"}},
)
async def push(
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    fleet: TheFleet,
    config: TheConfig,
    health: TheHealth,
    incoming: TheIncoming,
) -> Response:
    """Push a version of an adapter, as multipart, JSON or tensors.

    Multipart: `name`, `promote`, `visibility`, `engine`, `why`, `probe_min_effect` (what the probe asks of this
    version, in the place of the setting), `conversion_error` (what making another kind a LoRA may leave out),
    `probe` (false: it may change nothing), `keep` (so many versions stay beside those that serve), `dry_run`, and
    `files` (each file, or one .zip, .tar.gz or .tar.zst).
    JSON: the same with a `source` that the server fetches.
    application/octet-stream: the safetensors themselves; the fields are in the query, and PEFT's configuration is in
    the header X-Adapter-Config or in the metadata of the tensors as `adapter_config`.

    201 with the version; 200 when these bytes are a version already. 422 lists the tensors that do not fit the base, or
    says that the adapter changes nothing. By the adapter's policy a new version may get a share of the traffic first,
    or wait for its score on the golden set. With `dry_run` every check runs and nothing is kept: 200 says what the push
    would do.
    """
    health.check_started()
    async with incoming.quarantined(caller, stated_bytes(request)) as (folder, room):
        asked, came = await received(request, folder, room, config, caller)
        if asked.dry_run:
            return JSONResponse(await incoming.tried(request, caller, asked, folder, expected=expected))
        adapter, created = await incoming.admit(caller, asked, folder, expected=expected, came=came)
    request.state.subject = adapter.tag
    return JSONResponse(described(registry, fleet, adapter, caller), status_code=201 if created else 200)


@router.get("/v1/adapters")
async def adapters(
    caller: Manager,
    registry: TheRegistry,
    fleet: TheFleet,
    auto: TheAuto,
    after: str = "",
    limit: Annotated[int | None, Query(ge=1, le=MOST_LISTED)] = None,
) -> Response:
    """The adapters that the caller may change, by name, with their versions.

    With `limit` a page of them: the next one begins `after` the `last_id` of this one, while `has_more` says so.
    """
    begin = spelled(after, caller.tenant) if after else ""
    names = [full for full in registry.names() if manages(caller, full) and full > begin]
    page = names[:limit]
    end = {"has_more": len(page) < len(names), "last_id": short_name(page[-1], caller.tenant) if page else None}
    return StreamingResponse(_listed(registry, fleet, auto, caller, page, end), media_type="application/json")


async def _listed(
    registry: Registry, fleet: Fleet, auto: Auto, caller: Caller, page: Sequence[str], end: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """The list in pieces, between which others have their turn: ten thousand adapters are some megabytes."""
    yield b'{"object":"list","data":['
    separator = b""
    for begin in range(0, len(page), LISTED_AT_ONCE):
        # What was deleted meanwhile is not there any more.
        rows = [
            summary(registry, fleet, full, caller) | {"auto": auto.takes_part(full)}
            for full in page[begin : begin + LISTED_AT_ONCE]
            if full in registry
        ]
        if rows:
            yield separator + msgspec.json.encode(rows)[1:-1]
            separator = b","
        await asyncio.sleep(0)
    yield b"]," + msgspec.json.encode(end)[1:]


@router.get("/v1/adapters/{name:path}")
async def adapter(
    adapter: TheAdapter, response: Response, registry: TheRegistry, recent: TheRecent, auto: TheAuto
) -> dict[str, Any]:
    """One adapter: its versions, which is live, its recent latency, its history. The ETag is the live version."""
    full = adapter.full
    described = adapter.summary(full)
    # For a change's If-Match; of no use to a cache, since more changes here than what is live.
    response.headers.update({"etag": f'"{described["live"] or 0}"', "cache-control": "no-store"})
    for version in described["versions"]:
        version["recent"] = recent.described(full, f"v{version['version']}")
    described["auto"] = auto.takes_part(full)
    return {**described, "history": await asyncio.to_thread(registry.history, full)}


@router.post("/v1/adapters/{name:path}/promote")
async def promote(
    caller: Manager,
    adapter: TheAdapter,
    matching: Expected,
    admission: TheAdmission,
    policies: ThePolicies,
    body: Annotated[Promote, JsonBody(Promote)],
) -> dict[str, Any]:
    """Make a version live. With `expected_version` (or `If-Match`), 409 when another version is live by then."""
    adapter.about(f"@v{body.version}")
    full, expected = adapter.full, agreed(body.expected_version, matching)
    version, policy = adapter.version(body.version), policies[full]
    await admission.admit(
        version, policy.at_once if body.at_once else policy, caller.name, why=body.why, expected=expected
    )
    return adapter.described(version)


@router.post("/v1/adapters/{name:path}/rollback")
async def rollback(
    request: Request,
    caller: Manager,
    adapter: TheAdapter,
    matching: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Rollback, JsonBody(Rollback, required=False)],
) -> dict[str, Any]:
    """Make the version live that was live before this one. The body may be left out."""
    expected = agreed(body.expected_version, matching)
    done = await lifecycle.rollback(adapter.full, by=caller.name, expected=expected, why=body.why)
    request.state.subject = done.tag
    return adapter.described(done)


@router.post("/v1/adapters/{name:path}/canary")
async def canary(
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Weight, JsonBody(Weight)],
) -> dict[str, Any]:
    """Give a version a share of the name's traffic, for the same askers each time; a weight of 0 ends it."""
    return await _dealt("canary", adapter, body, expected, lifecycle)


@router.post("/v1/adapters/{name:path}/shadow")
async def shadow(
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Weight, JsonBody(Weight)],
) -> dict[str, Any]:
    """Let a version answer a share of the requests without showing its answers; a weight of 0 ends it."""
    return await _dealt("shadow", adapter, body, expected, lifecycle)


async def _dealt(
    kind: str, adapter: OneAdapter, body: Weight, expected: int | None, lifecycle: Lifecycle
) -> dict[str, Any]:
    """A share of the name's traffic for a version."""
    adapter.about(f"@v{body.version}")
    full, by = adapter.full, adapter.caller.name
    await lifecycle.share(full, kind, body.version, body.weight, by=by, why=body.why, expected=expected)
    return adapter.summary(full)


@router.post("/v1/adapters/{name:path}/visibility")
async def visibility(
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Visibility, JsonBody(Visibility)],
) -> dict[str, Any]:
    """Let every tenant ask this adapter (`shared`), or its own tenant alone (`private`)."""
    full, shared = adapter.full, body.visibility == "shared"
    await lifecycle.publish(full, shared, by=caller.name, why=body.why, expected=expected)
    return adapter.summary(full)


@router.post("/v1/adapters/{name:path}/rename")
async def rename(
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    golden: TheGolden,
    removal: TheRemoval,
    body: Annotated[Rename, JsonBody(Rename)],
) -> dict[str, Any]:
    """Give an adapter another name. The old one leads to it until it is removed (`DELETE /v1/adapters/OLD`).

    Its versions, history, aliases and golden set go along; latency and drift begin again. 409 while it has a canary or
    a shadow.
    """
    adapter.about(f" -> {body.to}")
    full = adapter.full
    new = full_name(tenant_of(full), check_name(body.to))
    before = await give_name(lifecycle, full, new, by=caller.name, why=body.why, expected=expected)
    await asyncio.to_thread(golden.results.refresh)
    await removal.forget(before)
    return adapter.summary(new)


@router.post("/v1/adapters/{name:path}/pin")
async def pin(
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Pin, JsonBody(Pin, required=False)],
) -> dict[str, Any]:
    """Keep a version in the engine's memory. The body may be left out: the live version is pinned then."""
    adapter.about(f"@v{body.version}" if body.version else "")
    full = adapter.full
    await lifecycle.pin(full, body.version, by=caller.name, why=body.why, expected=expected)
    return adapter.summary(full)


@router.delete("/v1/adapters/{name:path}/pin")
async def unpin(caller: Manager, adapter: TheAdapter, expected: Expected, lifecycle: TheLifecycle) -> dict[str, Any]:
    """End the pin."""
    full = adapter.full
    await lifecycle.unpin(full, by=caller.name, expected=expected)
    return adapter.summary(full)


@router.delete("/v1/adapters/{name:path}/versions/{number}")
async def remove_version(
    number: int,
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    removal: TheRemoval,
    force: bool = False,
    why: str = "",
) -> dict[str, Any]:
    """Remove a version; its last answers end first. A live version goes only with `force=true`."""
    adapter.about(f"@v{number}")
    gone = await lifecycle.remove(adapter.full, number, by=caller.name, force=force, expected=expected, why=why)
    await removal.forget(gone)
    return {"name": adapter.name, "deleted": [version.version for version in gone]}


@router.delete("/v1/adapters/{name:path}")
async def remove(
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    registry: TheRegistry,
    lifecycle: TheLifecycle,
    removal: TheRemoval,
    why: str = "",
) -> dict[str, Any]:
    """Remove an adapter with all its versions; of one that was renamed, the old name alone."""
    old = spelled(adapter.name, caller.tenant)
    if registry.moved_to(old) and manages(caller, old):
        await asyncio.to_thread(registry.end_move, old, by=caller.name)
        return {"name": adapter.name, "deleted": []}
    gone = await lifecycle.remove(adapter.full, by=caller.name, expected=expected, why=why)
    await removal.forget(gone)
    return {"name": adapter.name, "deleted": [version.version for version in gone]}
