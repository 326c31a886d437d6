"""An identity provider as the configuration has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.auth.rate_limits import UNLIMITED, Limits

# Signed with one key and checked with another: nothing that a public key could forge.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


@dataclass(frozen=True, slots=True)
class Provider:
    """An identity provider, and how its claims become callers.

    `tenants` and `scopes` say what values of the claims stand for ("*" is any); without them a value stands for itself.
    """

    issuer: str
    audience: tuple[str, ...]
    jwks: str = ""
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    tenant_claim: str = "tenant"
    tenants: Mapping[str, str] = field(default_factory=dict)
    scope_claim: str = "scope"
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leeway: float = 30.0
    limits: Limits = UNLIMITED
