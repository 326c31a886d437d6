"""How tenants are named in what leaves the server, also inside the full names of their adapters."""

from __future__ import annotations

import hashlib
from functools import lru_cache

NAME = "name"
HASH = "hash"
NONE = "none"


class TenantNames:
    """`how`: by `name`, by `hash` (the first 16 hex digits of its SHA-256), or not at all (`none`)."""

    def __init__(self, how: str) -> None:
        self._how = how

    def tenant(self, tenant: str) -> str:
        """The tenant; "" where it is not named."""
        if self._how == NAME or not tenant:
            return tenant
        return _hashed(tenant) if self._how == HASH else ""

    def model(self, full: str) -> str:
        """A full name, TENANT/NAME, or an id made of one."""
        if self._how == NAME:
            return full
        tenant, slash, name = full.partition("/")
        if not slash:
            return full
        shown = self.tenant(tenant)
        return f"{shown}/{name}" if shown else name


@lru_cache(4096)
def _hashed(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:16]
