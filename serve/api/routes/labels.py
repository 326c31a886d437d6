"""One version of an adapter: its files, and what people call it, which are aliases (`tone@stable`) and tags."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse

from serve.api.json_body import JsonBody
from serve.api.parts import TheFleet, TheLifecycle, TheRecent, TheRegistry
from serve.api.routes.callers import Expected, Manager, described, owned, summary
from serve.api.schemas import Alias, Tags
from serve.names import ALIAS_PATTERN, spelled

router = APIRouter()
AliasName = Annotated[str, Path(json_schema_extra={"pattern": ALIAS_PATTERN})]


@router.get("/v1/adapters/{name:path}/versions/{number}")
async def version(
    name: str, number: int, caller: Manager, registry: TheRegistry, fleet: TheFleet, recent: TheRecent
) -> dict[str, Any]:
    """One version: what it is, what its checks measured, its recent latency."""
    full = owned(registry, name, caller)
    adapter = registry.get(full, number)
    return {**described(registry, fleet, adapter, caller), "recent": recent.described(full, f"v{number}")}


@router.get("/v1/adapters/{name:path}/versions/{number}/files/{file}", response_class=FileResponse)
async def version_file(
    name: str,
    number: int,
    file: Literal["adapter_config.json", "adapter_model.safetensors"],
    request: Request,
    caller: Manager,
    registry: TheRegistry,
    lifecycle: TheLifecycle,
) -> FileResponse:
    """One of a version's two files, as it was pushed; who may change an adapter may have it."""
    request.state.audited = True
    full = owned(registry, name, caller)
    adapter = registry.get(full, number)
    request.state.subject = f"{adapter.tag} {file}"
    folder = await lifecycle.adapters.path(adapter)
    return FileResponse(folder / file, media_type="application/octet-stream", filename=file)


@router.put("/v1/adapters/{name:path}/versions/{number}/tags")
async def tags(
    name: str,
    number: int,
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    fleet: TheFleet,
    body: Annotated[Tags, JsonBody(Tags)],
) -> dict[str, Any]:
    """Write tags on a version, in the place of those that it has; an empty list removes them."""
    request.state.subject = f"{spelled(name, caller.tenant)}@v{number}"
    full = owned(registry, name, caller)
    write = registry.tag
    await asyncio.to_thread(write, full, number, body.tags, by=caller.name, why=body.why, expected=expected)
    return described(registry, fleet, registry.get(full, number), caller)


@router.put("/v1/adapters/{name:path}/aliases/{alias}")
async def alias(
    name: str,
    alias: AliasName,
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    fleet: TheFleet,
    lifecycle: TheLifecycle,
    body: Annotated[Alias, JsonBody(Alias)],
) -> dict[str, Any]:
    """Point `NAME@ALIAS` at a version. It stays there whatever is promoted; the version is loaded before it answers."""
    request.state.subject = f"{spelled(name, caller.tenant)}@{alias} -> v{body.version}"
    full = owned(registry, name, caller)
    await lifecycle.alias(full, alias, body.version, by=caller.name, why=body.why, expected=expected)
    return summary(registry, fleet, full, caller)


@router.delete("/v1/adapters/{name:path}/aliases/{alias}")
async def unalias(
    name: str,
    alias: AliasName,
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    fleet: TheFleet,
    lifecycle: TheLifecycle,
    why: str = "",
) -> dict[str, Any]:
    """Remove an alias; its version stays."""
    request.state.subject = f"{spelled(name, caller.tenant)}@{alias}"
    full = owned(registry, name, caller)
    await lifecycle.unalias(full, alias, by=caller.name, why=why, expected=expected)
    return summary(registry, fleet, full, caller)
