"""An API key becomes a Caller with scopes; inference and admin are different scopes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from serve.errors import Forbidden, Unauthorized


class Scope(StrEnum):
    INFERENCE = "inference"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is fit for a history: never the key itself."""

    name: str
    scopes: frozenset[Scope]


ANYBODY = Caller("anonymous", frozenset(Scope))


class Auth:
    """Knows keys by their sha256 alone. Without any key everybody may do everything (loopback only, see config)."""

    def __init__(self, api_keys: Iterable[str] = (), admin_keys: Iterable[str] = ()) -> None:
        callers = [(digest, Caller(f"key-{digest[:8]}", frozenset({Scope.INFERENCE}))) for digest in api_keys]
        callers += [(digest, Caller(f"admin-{digest[:8]}", frozenset(Scope))) for digest in admin_keys]
        self._callers = callers

    def caller(self, headers: Mapping[str, str], scope: Scope) -> Caller:
        """The caller behind `Authorization: Bearer KEY` (or `X-API-Key`), who must hold `scope`."""
        if not self._callers:
            return ANYBODY
        caller = self._known(_key(headers))
        if scope not in caller.scopes:
            raise Forbidden(f"this key may not do that: it takes a key with the scope {scope}")
        return caller

    def _known(self, key: str) -> Caller:
        if not key:
            raise Unauthorized("no API key came with the request: send `Authorization: Bearer KEY`")
        digest = hashlib.sha256(key.encode()).hexdigest()
        # Every key is compared, in constant time, so that the answer's time tells nothing.
        found = [caller for known, caller in self._callers if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthorized("the API key is not one that this server issued", code="invalid_api_key")
        return found[-1]


def _key(headers: Mapping[str, str]) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
