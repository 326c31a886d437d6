"""Callers with a token of an identity provider (OpenID Connect): a JWT that one of its keys signed.

Such a token is sent like an API key. It is checked off the event loop, before anything else looks at the request, and
then stands for a Caller: its claims say which tenant and scopes, its subject has the meters of a key. What is behind a
batch or a job goes on with the rights that the subject's last token had, for a day.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt

from serve.auth.auth import SUBJECT, Caller, Scope, check_scopes, token_of
from serve.auth.jwks import KeySet, fits
from serve.auth.provider import Provider
from serve.auth.subjects import Subjects
from serve.errors import BadRequest, LoradockError, Overloaded, Unauthorized
from serve.names import check_name, shown

# A longer token is refused unread; one that was checked is believed for so long, so many are remembered.
MAX_BYTES = 16 << 10
CHECKED_SECONDS = 300.0
REMEMBERED = 4096
# Tokens that wait to be checked; a further one is sent away.
WAITING = 256


class Tokens:
    """The tokens that were checked. `caller` never waits; `check` comes before it. `clock` is the time of day."""

    def __init__(
        self, provider: Provider, keys: KeySet, subjects: Subjects, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._provider = provider
        self._keys = keys
        self._subjects = subjects
        self._clock = clock
        self._checked: OrderedDict[bytes, tuple[float, Caller | LoradockError]] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, "oidc")
        self._waiting = 0

    def caller(self, token: str) -> Caller | None:
        """Whose token it is; None for what is no token. Unauthorized with the class of reason if it is refused."""
        if not _is_token(token):
            return None
        _, found = self._checked.get(_digest(token), (0.0, None))
        if isinstance(found, Caller):
            return found
        if found is None:
            raise _refused("it was not checked yet: send the request again")
        raise found

    def holder(self, id: str) -> Caller | None:
        """The subject with the rights of its last token, for a day."""
        return self._subjects.get(id)

    async def check(self, headers: Mapping[str, str]) -> None:
        """Have the request's token checked, if it has one."""
        token = token_of(headers)
        if not _is_token(token):
            return
        digest = _digest(token)
        until, found = self._checked.get(digest, (0.0, None))
        if isinstance(found, Caller) and self._clock() < until:
            self._checked.move_to_end(digest)
            return
        try:
            caller, expires = await self._verified(token)
        except LoradockError as error:
            self._remember(digest, 0.0, error)
        else:
            self._remember(digest, min(expires, self._clock() + CHECKED_SECONDS), caller)

    async def run(self) -> None:
        """Learn of subjects that other servers saw."""
        await self._subjects.run()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _verified(self, token: str) -> tuple[Caller, float]:
        if self._waiting >= WAITING:
            raise Overloaded("too many tokens wait to be checked: retry shortly", retry_after=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._verify, token)
        finally:
            self._waiting -= 1

    def _verify(self, token: str) -> tuple[Caller, float]:
        """Blocks: it may have to ask for the provider's keys."""
        provider = self._provider
        if len(token) > MAX_BYTES:
            raise _refused("it is too long")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError) as odd:
            raise _refused("it is malformed") from odd
        if (algorithm := header.get("alg")) not in provider.algorithms:
            raise _refused("its algorithm is not taken")
        if not isinstance(kid := header.get("kid"), str) or len(kid) > 256:
            raise _refused("it names no key")
        key = self._keys.get(kid)
        if key is None or not fits(key, algorithm):
            raise _refused("its key is unknown")
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=provider.audience,
                issuer=provider.issuer,
                leeway=provider.leeway,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            expires = float(claims["exp"]) + provider.leeway
        except jwt.PyJWTError as error:
            raise _refused(_reason(error)) from error
        except (ValueError, TypeError, OverflowError, RecursionError) as odd:
            raise _refused("its claims are not in order") from odd
        caller = self._caller(claims)
        self._subjects.note(caller)
        return caller, expires

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        provider, subject = self._provider, claims["sub"]
        tenants = {
            tenant
            for value in _values(claims.get(provider.tenant_claim), split=False)
            if (tenant := _meant(value, provider.tenants)) is not None
        }
        if len(tenants) != 1:
            raise _refused("its claims name no tenant of this server, or several")
        (tenant,) = tenants
        stated = _values(claims.get(provider.scope_claim), split=True)
        given = {name for value in stated for name in _given(value, provider.scopes)}
        scopes = frozenset(scope for scope in Scope if scope in given)
        try:
            check_name(tenant)
            check_scopes(tenant, scopes)
        except BadRequest as bad:
            raise _refused("its claims give no scope of this server, or one that its tenant cannot have") from bad
        digest = hashlib.sha256(f"{provider.issuer}\0{subject}".encode("utf-8", "replace")).hexdigest()
        name = claims.get("preferred_username")
        name = shown(name if isinstance(name, str) and name else subject, 64)
        return Caller(name, scopes, tenant, f"{SUBJECT}{digest[:24]}", provider.limits)

    def _remember(self, digest: bytes, until: float, found: Caller | LoradockError) -> None:
        self._checked[digest] = (until, found)
        self._checked.move_to_end(digest)
        while len(self._checked) > REMEMBERED:
            self._checked.popitem(last=False)


def _is_token(text: str) -> bool:
    """It looks like a JWT: three parts, the first of which is a JSON object."""
    return text.startswith("eyJ") and text.count(".") == 2


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _values(claim: Any, *, split: bool) -> list[str]:
    """A text or its words, or a list's texts."""
    if isinstance(claim, str):
        return claim.split() if split else [claim]
    return [value for value in claim if isinstance(value, str)] if isinstance(claim, list) else []


def _meant(value: str, meanings: Mapping[str, str]) -> str | None:
    return meanings.get(value, meanings.get("*")) if meanings else value


def _given(value: str, scopes: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return (*scopes.get(value, ()), *scopes.get("*", ())) if scopes else (value,)


def _refused(reason: str) -> Unauthorized:
    return Unauthorized(f"the token was refused: {reason}", code="invalid_token")


def _reason(error: jwt.PyJWTError) -> str:
    """The class of reason, without what would have been right."""
    for kind, reason in (
        (jwt.ExpiredSignatureError, "it has expired"),
        (jwt.ImmatureSignatureError, "it is not valid yet"),
        (jwt.InvalidAudienceError, "it is for another audience"),
        (jwt.InvalidIssuerError, "it is of another issuer"),
        (jwt.MissingRequiredClaimError, "a claim is missing"),
        (jwt.InvalidSignatureError, "its signature is wrong"),
    ):
        if isinstance(error, kind):
            return reason
    return "it is not in order"
