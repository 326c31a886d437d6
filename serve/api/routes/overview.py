"""What the dashboard asks for: each answer is a page, whatever the number of adapters, versions or changes."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import PositiveInt

from serve.adapters.registry.change_log import recent_changes
from serve.api.parts import TheOverview, TheRegistry
from serve.api.routes.callers import Manager, owned
from serve.names import short_name

router = APIRouter()

Search = Annotated[str, Query(max_length=130, description="A part of adapters' names.")]
Limit = Annotated[int, Query(ge=1, le=100)]
Offset = Annotated[int, Query(ge=0, le=1_000_000)]
# Also the largest number that a column of the database takes.
Before = Annotated[int, Query(ge=1, le=2**63 - 1)]


@router.get("/v1/overview")
async def adapters_overview(
    caller: Manager, overview: TheOverview, search: Search = "", offset: Offset = 0, limit: Limit = 50
) -> dict[str, Any]:
    """Adapters that the caller may change: in `first` those with a problem, then those with traffic, up to twelve and
    with their versions; in `data` a page of the others. `problems` says what is wrong, `requests` and `errors` are of
    the last half hour."""
    return await overview.page(caller, search, offset, limit)


@router.get("/v1/overview/changes")
async def changes(
    caller: Manager, registry: TheRegistry, search: Search = "", before: Before | None = None, limit: Limit = 50
) -> dict[str, Any]:
    """What was changed of all adapters, the latest first; `before` is an `id`, and gives the ones before it."""
    tenant = None if caller.operator else caller.tenant
    rows = await asyncio.to_thread(
        recent_changes, registry, tenant, search=search.strip(), before=before, limit=limit + 1
    )
    data = [{**row, "adapter": short_name(row["adapter"], caller.tenant)} for row in rows[:limit]]
    return {"object": "list", "data": data, "has_more": len(rows) > limit}


@router.get("/v1/overview/adapters/{name:path}")
async def one_adapter(
    name: str, caller: Manager, registry: TheRegistry, overview: TheOverview, before: PositiveInt | None = None
) -> dict[str, Any]:
    """One adapter as `/v1/overview` has it in `first`; with `before`, its twenty versions before that number."""
    return await overview.adapter(caller, owned(registry, name, caller), before)
