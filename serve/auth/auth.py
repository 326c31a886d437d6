"""An API key, or a token of an identity provider, becomes a Caller: a tenant, scopes and limits.

inference        asks, and lists the models that its tenant may ask
adapters:write   pushes, promotes, rolls back and deletes its tenant's adapters
finetune:work    trains jobs of every tenant on another machine: it reads their examples, and brings adapters
metrics          reads /metrics and what is below it, for Prometheus. They name every tenant's adapters
admin            an operator: everything, in every tenant

Only keys of tenant `default` hold the last three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from serve.auth.rate_limits import UNLIMITED, Limits
from serve.errors import BadRequest, Forbidden, Unauthorized
from serve.names import DEFAULT


class Scope(StrEnum):
    INFERENCE = "inference"
    ADAPTERS = "adapters:write"
    WORK = "finetune:work"
    METRICS = "metrics"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is fit for a history: never the key itself. `key` tells keys of one name apart."""

    name: str
    scopes: frozenset[Scope]
    tenant: str = DEFAULT
    key: str = ""
    limits: Limits = UNLIMITED

    @property
    def operator(self) -> bool:
        """May see and change what any tenant has."""
        return Scope.ADMIN in self.scopes


ANYBODY = Caller("anonymous", frozenset(Scope))
# No key has an id that begins so; a subject of an identity provider has.
_STANDING, SUBJECT = "loop:", "oidc:"


class TokenCallers(Protocol):
    """Callers with tokens of an identity provider (serve.auth.oidc)."""

    def caller(self, token: str, /) -> Caller | None: ...
    def holder(self, id: str, /) -> Caller | None: ...


class Auth:
    """Knows keys by their sha256 alone: the config's, which are tenant `default`'s, and those that were `issued`.

    Without any key everybody may do everything (loopback only, see config); `locked` says that keys were issued.
    """

    def __init__(
        self,
        api_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        issued: Callable[[str], Caller | None] = lambda digest: None,
        locked: Callable[[], bool] = lambda: False,
        metrics_keys: Iterable[str] = (),
        holder: Callable[[str], Caller | None] = lambda id: None,
        tokens: TokenCallers | None = None,
    ) -> None:
        self._callers: dict[str, Caller] = {}
        for digests, name, scopes in (
            (metrics_keys, "metrics", {Scope.METRICS}),
            (api_keys, "key", {Scope.INFERENCE}),
            (admin_keys, "admin", Scope),
        ):
            for digest in digests:
                self._callers[digest] = Caller(f"{name}-{digest[:8]}", frozenset(scopes), key=digest[:8])
        self._configured = {caller.key: caller for caller in self._callers.values()}
        self._issued = issued
        self._holder = holder
        self._locked = locked
        self._tokens = tokens

    @property
    def open(self) -> bool:
        """Nobody has a key, so everybody may do everything."""
        return not self._callers and not self._locked() and self._tokens is None

    def caller(self, headers: Mapping[str, str], scope: Scope) -> Caller:
        """The caller behind `Authorization: Bearer KEY` (or `X-API-Key`), who must hold `scope`."""
        if self.open:
            return ANYBODY
        return allowed(self.known(headers), scope)

    def standing(self, tenant: str) -> Caller:
        """Who acts for a tenant by itself, as the operator's policy says: with no key, so that no client can be it."""
        return Caller("loop", frozenset({Scope.INFERENCE, Scope.ADAPTERS}), tenant, key=f"{_STANDING}{tenant}")

    def holder(self, key: str) -> Caller:
        """The caller with the key of this id ("" on a server without keys); Unauthorized once it is not taken."""
        if key.startswith(_STANDING):
            return self.standing(key.removeprefix(_STANDING))
        if self.open and not key:
            return ANYBODY
        if self._tokens is not None and key.startswith(SUBJECT):
            caller = self._tokens.holder(key)
        else:
            caller = self._configured.get(key) or self._holder(key)
        if caller is None:
            raise Unauthorized("the API key that asked for this is not taken any more", code="invalid_api_key")
        return caller

    def known(self, headers: Mapping[str, str]) -> Caller:
        """The caller, whatever may be asked of them; Unauthorized if nobody issued this key."""
        if self.open:
            return ANYBODY
        key = token_of(headers)
        if not key:
            raise Unauthorized("no API key came with the request: send `Authorization: Bearer KEY`")
        # Looked up by its sha256: how long that takes tells nothing of a key that is nearly right.
        digest = hashlib.sha256(key.encode()).hexdigest()
        caller = self._callers.get(digest) or self._issued(digest)
        if caller is None and self._tokens is not None:
            caller = self._tokens.caller(key)
        if caller is None:
            raise Unauthorized("the API key is not one that this server issued", code="invalid_api_key")
        return caller


def allowed(caller: Caller, scope: Scope) -> Caller:
    """The caller, if they hold `scope`."""
    if scope not in caller.scopes and not caller.operator:
        raise Forbidden(f"this key may not do that: it takes a key with the scope {scope}")
    return caller


def check_scopes(tenant: str, scopes: Collection[Scope]) -> None:
    """BadRequest for what a caller of this tenant cannot hold."""
    if not scopes:
        raise BadRequest(f"a key needs a scope: {', '.join(Scope)}", param="scopes")
    if tenant != DEFAULT and (operators := {Scope.ADMIN, Scope.METRICS, Scope.WORK} & set(scopes)):
        raise BadRequest(
            f"{sorted(operators)[0]} is for operators, whose tenant is {DEFAULT}: it shows what every tenant has; "
            f"give it {Scope.INFERENCE} or {Scope.ADAPTERS}",
            param="scopes",
        )


def token_of(headers: Mapping[str, str]) -> str:
    """The API key or token of a request; "" if it has none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
