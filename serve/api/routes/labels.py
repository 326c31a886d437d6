"""One version of an adapter: its files, its validation, and what people call it: aliases (`tone@stable`) and tags."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse

from serve.api.json_body import JsonBody
from serve.api.parts import TheLifecycle, TheRecent, TheRegistry, TheValidation
from serve.api.routes.callers import Expected, Manager, TheAdapter
from serve.api.schemas import Alias, Tags, Validate
from serve.names import ALIAS_PATTERN

router = APIRouter()
AliasName = Annotated[str, Path(json_schema_extra={"pattern": ALIAS_PATTERN})]


@router.get("/v1/adapters/{name:path}/versions/{number}")
async def version(number: int, adapter: TheAdapter, recent: TheRecent) -> dict[str, Any]:
    """One version: what it is, what its checks measured, its recent latency."""
    version = adapter.version(number)
    return {**adapter.described(version), "recent": recent.described(version.name, f"v{number}")}


@router.get("/v1/adapters/{name:path}/versions/{number}/files/{file}", response_class=FileResponse)
async def version_file(
    number: int,
    file: Literal["adapter_config.json", "adapter_model.safetensors"],
    request: Request,
    adapter: TheAdapter,
    lifecycle: TheLifecycle,
) -> FileResponse:
    """One of a version's two files, as it was pushed; who may change an adapter may have it."""
    request.state.audited = True
    adapter.about(f"@v{number} {file}")
    folder = await lifecycle.adapters.path(adapter.version(number))
    return FileResponse(folder / file, media_type="application/octet-stream", filename=file)


@router.post("/v1/adapters/{name:path}/versions/{number}/validate")
async def validate(
    number: int,
    caller: Manager,
    adapter: TheAdapter,
    validation: TheValidation,
    body: Annotated[Validate, JsonBody(Validate, required=False)],
) -> dict[str, Any]:
    """Measure what a version did to its base, and answer when that is done, within minutes; the body may be left out.

    The report stands among the version's checks as `validation`: what the base could and the version cannot, whether it
    refuses as before, how sure it is, and with ids of examples its loss and what it says again of them. A policy can
    ask for it before a version gets traffic.
    """
    version = adapter.version(number)
    adapter.about(f"@v{number}")
    given = {"training_file": body.training_file, "validation_file": body.validation_file}
    await validation.run(version, caller, {name: id for name, id in given.items() if id})
    return adapter.described(adapter.version(number))


@router.put("/v1/adapters/{name:path}/versions/{number}/tags")
async def tags(
    number: int,
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    registry: TheRegistry,
    body: Annotated[Tags, JsonBody(Tags)],
) -> dict[str, Any]:
    """Write tags on a version, in the place of those that it has; an empty list removes them."""
    adapter.about(f"@v{number}")
    write = registry.tag
    await asyncio.to_thread(write, adapter.full, number, body.tags, by=caller.name, why=body.why, expected=expected)
    return adapter.described(adapter.version(number))


@router.put("/v1/adapters/{name:path}/aliases/{alias}")
async def alias(
    alias: AliasName,
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    body: Annotated[Alias, JsonBody(Alias)],
) -> dict[str, Any]:
    """Point `NAME@ALIAS` at a version. It stays there whatever is promoted; the version is loaded before it answers."""
    adapter.about(f"@{alias} -> v{body.version}")
    full = adapter.full
    await lifecycle.alias(full, alias, body.version, by=caller.name, why=body.why, expected=expected)
    return adapter.summary(full)


@router.delete("/v1/adapters/{name:path}/aliases/{alias}")
async def unalias(
    alias: AliasName,
    caller: Manager,
    adapter: TheAdapter,
    expected: Expected,
    lifecycle: TheLifecycle,
    why: str = "",
) -> dict[str, Any]:
    """Remove an alias; its version stays."""
    adapter.about(f"@{alias}")
    full = adapter.full
    await lifecycle.unalias(full, alias, by=caller.name, why=why, expected=expected)
    return adapter.summary(full)
