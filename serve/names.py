"""Whose an adapter is, as its full name says it: NAME in tenant `default`, TENANT/NAME in any other.

Registry, engine, prefix cache, metrics and audit log know adapters by full names alone, so that two tenants' adapters
of one name can never meet. People use the short name for what is theirs:

    NAME           the caller's own adapter; else the one that tenant `default` shares
    TENANT/NAME    that tenant's, if it is the caller's own or shared (`default/NAME` for the default tenant's)

What another tenant shares answers under its full name only: were it to answer under NAME, a tenant could step in for
an adapter that somebody else has deleted, or never had.
"""

from __future__ import annotations

import re
from typing import Any

from serve.errors import BadRequest

DEFAULT = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def full_name(tenant: str, name: str) -> str:
    """The full name of `name` in `tenant`."""
    return name if tenant == DEFAULT else f"{tenant}/{name}"


def tenant_of(full: str) -> str:
    """Whose adapter this is."""
    tenant, slash, _ = full.partition("/")
    return tenant if slash else DEFAULT


def short_name(full: str, tenant: str) -> str:
    """The name by which `tenant` itself knows the adapter."""
    return full.rpartition("/")[2] if tenant_of(full) == tenant else full


def spelled(public: str, tenant: str) -> str:
    """The full name (with @VERSION, if there is one) that `tenant` means, were it to own what has no tenant in it."""
    owner, slash, rest = public.partition("/")
    return full_name(owner, rest) if slash else full_name(tenant, public)


def check_name(name: str) -> str:
    """The name, if an adapter may bear it."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise BadRequest(
        f"`{shown(name)}` cannot be an adapter's name: take 1 to 64 letters, digits, dots, dashes or underscores, "
        "beginning with a letter or a digit",
        param="name",
    )


def check_full_name(full: str) -> str:
    """The full name, if an adapter may bear it: NAME, or TENANT/NAME of another tenant than `default`."""
    tenant, slash, name = full.partition("/") if isinstance(full, str) else (full, "", "")
    if slash:
        check_name(name)
    if check_name(tenant) == DEFAULT and slash:
        raise BadRequest(f"the full name of {shown(full)} is {shown(name)}", param="name")
    return full


def shown(value: Any, limit: int = 160) -> str:
    """Any value, short and printable enough for an error message."""
    text = value if isinstance(value, str) else repr(value) if not isinstance(value, Exception) else str(value)
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
