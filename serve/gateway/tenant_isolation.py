"""What keeps tenants apart inside an engine, which knows none: prefix caches, and responses that it stores."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Any

from serve.errors import NotFound
from serve.names import DEFAULT, OWNER_DIGITS

# A stored response lives in this process; so does what proves whose it is.
_SIGNING_KEY = secrets.token_bytes(32)
_SIGNED = re.compile(r"resp_(?P<nonce>[0-9a-f]{32})(?P<signature>[0-9a-f]{32})")


def tenant_salt(salt: Any, tenant: str) -> str | None:
    """The cache_salt that the engine gets for a client's; None leaves the request as it is.

    It holds no @, as every adapter's id does, and begins with the tenant, whose name holds no colon: so no client can
    reach an adapter's part of the prefix cache, nor another tenant's. Without a salt the keys of tenant `default`
    share one cache, and each other tenant has its own: what is cached there shows in how fast an answer begins.
    """
    if isinstance(salt, str) and salt:
        return f"{tenant}:{hashlib.sha256(salt.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"
    # vLLM refuses what is neither a text nor null.
    return tenant if salt is None and tenant != DEFAULT else None


def new_response_id(tenant: str) -> str:
    """An id for a response that this tenant alone may name again; a tenant's ids begin alike (`response_owner`)."""
    owner = hmac.new(_SIGNING_KEY, tenant.encode(), "sha256").hexdigest()[:OWNER_DIGITS]
    return _response_id(tenant, owner + secrets.token_hex(16 - OWNER_DIGITS // 2))


def check_response_owner(id: str, tenant: str) -> None:
    """NotFound, if the stored response is not this tenant's."""
    signed = _SIGNED.fullmatch(id)
    if signed is None or not hmac.compare_digest(id, _response_id(tenant, signed["nonce"])):
        raise NotFound(f"Response with id '{id}' not found.", param="response_id")


def _response_id(tenant: str, nonce: str) -> str:
    return f"resp_{nonce}{hmac.new(_SIGNING_KEY, f'{nonce}{tenant}'.encode(), 'sha256').hexdigest()[:32]}"
