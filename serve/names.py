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
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

from serve.errors import BadRequest, Conflict

DEFAULT = "default"
_beginning = Repr()
_beginning.maxlevel = _beginning.maxlist = _beginning.maxdict = 20
_beginning.maxstring = _beginning.maxlong = _beginning.maxother = 400

# As JSON schemas have it; what is refused, and how, is below.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ALIAS_PATTERN = r"^(?!(v[0-9]+|[0-9a-f]{12})$)[A-Za-z][A-Za-z0-9._-]{0,31}$"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Neither v3 nor twelve digits of a digest, which NAME@... may be too.
_ALIAS = re.compile(r"(?!(?:v[0-9]+|[0-9a-f]{12})\Z)[A-Za-z][A-Za-z0-9._-]{0,31}")
MAX_TAGS, MAX_TAG = 16, 64
# Of a stored response's id.
OWNER_DIGITS = 8
# How metrics and usage call mixtures of adapters, whose names clients make up, and the version of each.
MIXTURES, MIXED = "(mixtures)", "mixed"
# DELETE /v1/adapters/TENANT/pin would be both the adapter TENANT's pin and the tenant's adapter `pin`; so with
# GET /v1/adapters/TENANT/drift, /baseline and /golden.
RESERVED = ("pin", "drift", "baseline", "golden")


def full_name(tenant: str, name: str) -> str:
    """The full name of `name` in `tenant`."""
    return name if tenant == DEFAULT else f"{tenant}/{name}"


def tenant_of(full: str) -> str:
    """Whose adapter this is."""
    tenant, slash, _ = full.partition("/")
    return tenant if slash else DEFAULT


def accounted_name(id: str) -> str:
    """Under which adapter's name an engine's id is counted; all mixtures of a tenant are one, which nobody can push."""
    full = id.rpartition("@")[0]
    return full_name(tenant_of(full), MIXTURES) if "+" in full else full


def part_label(full: str, tenant: str) -> str:
    """How an adapter is called in the name of a tenant's mixture; another tenant's loses its slash."""
    return short_name(full, tenant).replace("/", ".")


def has_part(id: str, full: str) -> bool:
    """The engine's id is of a mixture that has this adapter in it."""
    mixture = id.rpartition("@")[0]
    tenant = tenant_of(mixture)
    return "+" in mixture and part_label(full, tenant) in short_name(mixture, tenant).split("+")


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


def check_adapter_name(full: str, bases: Iterable[str]) -> str:
    """The full name, if a new adapter may bear it beside these base models."""
    check_full_name(full)
    short = short_name(full, tenant_of(full))
    if taken := next((base for base in bases if base in (full, short)), None):
        raise Conflict(f"{taken!r} is the base model's name: choose another for the adapter", param="name")
    if short in RESERVED:
        raise BadRequest(
            f"{short!r} cannot be an adapter's name, because it ends a path of this server: choose another",
            param="name",
        )
    return full


def check_alias(alias: str) -> str:
    """The name, if it may point at a version: NAME@ALIAS."""
    if _ALIAS.fullmatch(alias):
        return alias
    raise BadRequest(
        f"`{shown(alias)}` cannot be an alias: take 1 to 32 letters, digits, dots, dashes or underscores, beginning "
        "with a letter, and neither a version (v3) nor a digest",
        param="alias",
    )


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags of a version, each once."""
    checked = tuple(dict.fromkeys(tags))
    if len(checked) > MAX_TAGS:
        raise BadRequest(f"a version takes up to {MAX_TAGS} tags, not {len(checked)}", param="tags")
    for tag in checked:
        if not 1 <= len(tag) <= MAX_TAG or not tag.isprintable() or tag != tag.strip():
            raise BadRequest(
                f"`{shown(tag)}` cannot be a tag: take 1 to {MAX_TAG} printable characters, without spaces at the ends",
                param="tags",
            )
    return checked


def response_owner(id: str) -> str:
    """What the ids of one tenant's stored responses have in common, and no other's."""
    return id.removeprefix("resp_")[:OWNER_DIGITS]


def shown(value: Any, limit: int = 160) -> str:
    """Any value, short and printable enough for an error message."""
    if isinstance(value, list | dict):
        value = _beginning.repr(value)  # of as many items as a client may send
    text = value if isinstance(value, str) else repr(value) if not isinstance(value, Exception) else str(value)
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
