"""Keys of tenants, by an operator."""

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request

from serve.api.json_body import JsonBody
from serve.api.parts import TheAuth, TheKeys
from serve.api.routes.callers import Operator
from serve.api.schemas import NewKey
from serve.auth.rate_limits import Limits
from serve.errors import Conflict

router = APIRouter()


@router.post("/v1/keys", status_code=201)
async def create_key(
    request: Request,
    caller: Operator,
    auth: TheAuth,
    keys: TheKeys,
    body: Annotated[NewKey, JsonBody(NewKey, strict=True)],
) -> dict[str, Any]:
    """Create a key of a tenant. The answer holds its secret, which is not shown again."""
    request.state.subject = f"{body.tenant}/{body.name}"
    if auth.open:
        raise Conflict(
            "this server has no key, so everybody may do everything: "
            "start it with LORADOCK_ADMIN_KEYS, then create keys with that one"
        )
    limits = Limits(**msgspec.structs.asdict(body.limits))
    key, secret = await asyncio.to_thread(keys.create, body.tenant, body.name, body.scopes, limits)
    request.state.subject = f"{body.tenant}/{body.name} {key.id}"
    return {**key.described(), "secret": secret}


@router.get("/v1/keys")
async def list_keys(caller: Operator, keys: TheKeys, tenant: str | None = None) -> dict[str, Any]:
    """The keys, without their secrets."""
    rows = [key.described() for key in keys.all() if tenant in (None, key.tenant)]
    return {"object": "list", "data": rows}


@router.delete("/v1/keys/{id}")
async def revoke_key(id: str, request: Request, caller: Operator, keys: TheKeys) -> dict[str, Any]:
    """Revoke a key; the next request with it gets 401."""
    key = await asyncio.to_thread(keys.revoke, id)
    request.state.subject = f"{key.tenant}/{key.name} {key.id}"
    return key.described()
