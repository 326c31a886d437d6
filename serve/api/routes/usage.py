"""What was used in a month, and what it cost."""

import asyncio
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query

from serve.api.parts import TheConfig, TheUsageLedger
from serve.api.routes.callers import Manager
from serve.errors import BadRequest, Forbidden
from serve.names import shown
from serve.telemetry.usage.usage_ledger import COUNTS

router = APIRouter()

Month = Annotated[str, Query(json_schema_extra={"pattern": "^([0-9]{4}-(0[1-9]|1[0-2]))?$"})]
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")


@router.get("/v1/usage")
async def usage(
    caller: Manager,
    config: TheConfig,
    usage_ledger: TheUsageLedger,
    month: Month | None = None,
    tenant: str | None = None,
) -> dict[str, Any]:
    """Requests, tokens, seconds of the engine and cost of a month (`2026-11`; by default this one, UTC), by tenant and
    adapter. A tenant sees its own; operators see all, or one `tenant`'s."""
    month = month or datetime.now(UTC).strftime("%Y-%m")
    if not _MONTH.fullmatch(month):
        raise BadRequest(f"month takes a year and a month, as 2026-11, not {shown(month, 40)}", param="month")
    if not caller.operator:
        if tenant not in (None, caller.tenant):
            raise Forbidden(f"this key sees the usage of its own tenant, {caller.tenant}: leave `tenant` out")
        tenant = caller.tenant
    await asyncio.to_thread(usage_ledger.write)
    rows = await asyncio.to_thread(usage_ledger.rows, month, tenant)
    total = {name: sum(row[name] for row in rows) for name in COUNTS}
    return {"object": "list", "month": month, "currency": config.currency, "data": rows, "total": total}
