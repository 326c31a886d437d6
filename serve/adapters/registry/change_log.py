"""The registry's history over all names, the latest change first."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import history, names
from serve.names import DEFAULT


def recent_changes(
    registry: Registry, tenant: str | None, *, search: str = "", before: int | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """Changes of the tenant's adapters (None: of everybody's), also of such that are gone.

    `search` is a part of the adapter's full name; `before` is the `id` of a change. Blocks.
    """
    columns = [column for column in history.c if column.name != "name_id"]
    query = select(*columns, names.c.name.label("adapter")).join(names).order_by(history.c.id.desc()).limit(limit)
    if tenant == DEFAULT:
        query = query.where(~names.c.name.contains("/"))
    elif tenant is not None:
        query = query.where(names.c.name.startswith(f"{tenant}/", autoescape=True))
    if "\0" in search:  # PostgreSQL takes none, and no name has one
        return []
    if search:
        query = query.where(names.c.name.icontains(search, autoescape=True))
    if before is not None:
        query = query.where(history.c.id < before)
    with registry.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]
