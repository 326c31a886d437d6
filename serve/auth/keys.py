"""API keys that were issued: a row of the registry's database each, and a dictionary in memory that requests ask.

The secret leaves once, when the key is created; what is kept is its sha256.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import keys as table
from serve.auth.auth import Caller, Scope, check_scopes
from serve.auth.rate_limits import Limits
from serve.errors import BadRequest, NotFound
from serve.names import check_name, shown

PREFIX = "ld_"
_LIMITS = frozenset(field.name for field in fields(Limits))


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key."""

    id: str
    tenant: str
    name: str
    digest: str
    scopes: frozenset[Scope]
    limits: Limits
    created: float
    revoked: float | None = None

    @property
    def caller(self) -> Caller:
        """Who comes with it."""
        return Caller(self.name, self.scopes, self.tenant, self.id, self.limits)

    def described(self) -> dict[str, Any]:
        """The key for the API, without its digest."""
        return {
            "object": "api_key",
            "id": self.id,
            "tenant": self.tenant,
            "name": self.name,
            "scopes": sorted(self.scopes),
            "limits": asdict(self.limits),
            "created": int(self.created),
            "revoked": None if self.revoked is None else int(self.revoked),
        }


class Keys:
    """Every key that was issued. Changes are sync and thread-safe; `caller` never meets the database."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._callers: dict[str, Caller] = {}
        self._by_id: dict[str, Caller] = {}
        self._read()

    @property
    def any(self) -> bool:
        """A key was issued, be it revoked since."""
        return bool(self._keys)

    def caller(self, digest: str) -> Caller | None:
        """Whose secret has this sha256."""
        return self._callers.get(digest)

    def holder(self, id: str) -> Caller | None:
        """Who comes with the key of this id, unless it was revoked."""
        return self._by_id.get(id)

    def all(self) -> tuple[Key, ...]:
        """Every key, oldest first, the revoked too."""
        return self._keys

    def create(self, tenant: str, name: str, scopes: Iterable[str], limits: Limits) -> tuple[Key, str]:
        """A new key, and its secret, which nobody can tell again."""
        key, secret = _made(tenant, name, scopes, limits, self._clock())
        # Without those that are not set: a server of another version may not know them.
        set_limits = {limit: value for limit, value in asdict(limits).items() if value is not None}
        row = {**asdict(key), "scopes": json.dumps(sorted(key.scopes)), "limits": json.dumps(set_limits)}
        with self._registry.transaction() as connection:
            connection.execute(insert(table).values(**row))
        self._read()
        return key, secret

    def revoke(self, id: str) -> Key:
        """The key opens nothing from now on; answers under way finish. Twice is once."""
        with self._registry.transaction() as connection:
            where = (table.c.id == id) & table.c.revoked.is_(None)
            connection.execute(update(table).where(where).values(revoked=self._clock()))
        self._read()
        for key in self._keys:
            if key.id == id:
                return key
        raise NotFound(f"there is no key {shown(id)}: GET /v1/keys lists them", code="key_not_found")

    def refresh(self) -> None:
        """Read again what another process may have changed."""
        self._read()

    def _read(self) -> None:
        with self._registry.reading() as connection:
            rows = connection.execute(select(table).order_by(table.c.created, table.c.id))
            self._keys = tuple(_key(row) for row in rows)
            self._callers = {key.digest: key.caller for key in self._keys if key.revoked is None}
            self._by_id = {caller.key: caller for caller in self._callers.values()}


def _made(tenant: str, name: str, scopes: Iterable[str], limits: Limits, now: float) -> tuple[Key, str]:
    for what, value in (("tenant", tenant), ("name", name)):
        try:
            check_name(value)
        except BadRequest as bad:
            raise BadRequest(bad.message.replace("an adapter's name", f"a key's {what}"), param=what) from bad
    try:
        held = frozenset(Scope(scope) for scope in scopes)
    except ValueError as unknown:
        raise BadRequest(f"scopes takes {', '.join(Scope)}: {unknown}", param="scopes") from unknown
    check_scopes(tenant, held)
    for limit, value in asdict(limits).items():
        if value is not None and not 1 <= value < 1 << 53:
            raise BadRequest(f"{limit} takes a number from 1 up, or null for no limit", param=f"limits.{limit}")
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return Key(f"key_{secrets.token_hex(8)}", tenant, name, digest, held, limits, now), secret


def _key(row: Any) -> Key:
    """Scopes and limits that a newer release gave it say nothing here."""
    return Key(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        digest=row.digest,
        scopes=frozenset(scope for scope in Scope if scope in json.loads(row.scopes)),
        limits=Limits(**{limit: value for limit, value in json.loads(row.limits).items() if limit in _LIMITS}),
        created=row.created,
        revoked=row.revoked,
    )
