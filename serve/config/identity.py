"""The identity provider whose tokens are taken, out of the settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from serve.auth.auth import Scope
from serve.auth.provider import ALGORITHMS, Provider
from serve.auth.rate_limits import LIMITS, Limits
from serve.config.settings import Config
from serve.errors import BadRequest, ConfigError
from serve.names import check_name

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def provider_of(config: Config) -> Provider | None:
    """None without one; ConfigError for one that cannot be."""
    if not config.oidc_issuer:
        if config.oidc_audience or config.oidc_jwks:
            raise ConfigError("oidc_audience and oidc_jwks are of tokens of an issuer: set oidc_issuer")
        return None
    for name, address in (("oidc_issuer", config.oidc_issuer), ("oidc_jwks", config.oidc_jwks)):
        if address:
            _check_address(name, address)
    if not config.oidc_audience:
        raise ConfigError("oidc_issuer needs oidc_audience: without it a token for another service would be taken")
    for algorithm in config.oidc_algorithms or ("none",):
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"oidc_algorithms takes {', '.join(ALGORITHMS)}, not {algorithm!r}")
    tenants, scopes = dict(_pairs("oidc_tenants", config.oidc_tenants)), _meanings(config.oidc_scopes)
    for tenant in tenants.values():
        try:
            check_name(tenant)
        except BadRequest as bad:
            raise ConfigError(f"oidc_tenants: {bad.message}") from bad
    return Provider(
        config.oidc_issuer,
        config.oidc_audience,
        config.oidc_jwks,
        config.oidc_algorithms,
        config.oidc_tenant_claim,
        tenants,
        config.oidc_scope_claim,
        scopes,
        config.oidc_leeway,
        _limits(config.oidc_limits),
    )


def _check_address(name: str, address: str) -> None:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(f"{name} {address!r} is no address: {error}") from error
    is_here = parts.scheme == "http" and parts.hostname in _LOOPBACK
    if not parts.hostname or not (parts.scheme == "https" or is_here):
        raise ConfigError(
            f"{name} takes https://..., not {address!r}: who sends the keys decides who may do everything"
        )


def _pairs(name: str, texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        value, equals, meaning = text.partition("=")
        if not equals or not value or not meaning:
            raise ConfigError(f"{name} takes VALUE=MEANING, not {text!r}")
        yield value, meaning


def _meanings(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A value may mean several scopes."""
    scopes: dict[str, tuple[str, ...]] = {}
    for value, scope in _pairs("oidc_scopes", texts):
        if scope not in set(Scope):
            raise ConfigError(f"oidc_scopes takes {', '.join(Scope)}, not {scope!r}")
        scopes[value] = (*scopes.get(value, ()), scope)
    return scopes


def _limits(texts: Iterable[str]) -> Limits:
    limits = {}
    for name, value in _pairs("oidc_limits", texts):
        if name not in LIMITS or not re.fullmatch("[1-9][0-9]{0,14}", value):
            raise ConfigError(f"oidc_limits takes {', '.join(LIMITS)} with a number from 1 up, not {name}={value}")
        limits[name] = int(value)
    return Limits(**limits)
