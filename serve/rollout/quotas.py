"""How many adapters, bytes and pins a tenant may have here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Protocol

from serve.adapters.registry.registry import Registry
from serve.auth.rate_limits import Limits
from serve.errors import Conflict, QuotaExceeded
from serve.names import DEFAULT, tenant_of

# The places for pinned adapters that one tenant may take, as a part of all; `default` may take them all.
PINS_OF_A_TENANT = 4


class Kept(Protocol):
    """A version that a tenant has."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def kept_bytes(registry: Registry, tenant: str | None) -> dict[str, int]:
    """Bytes of versions by tenant: of this one, or of all."""
    kept: Counter[str] = Counter()
    for version in registry.adapters():
        if tenant in (None, version.tenant):
            kept[version.tenant] += version.nbytes
    return kept


def check_push(kept: Iterable[Kept], *, name: str, digest: str, nbytes: int, quota: Limits) -> None:
    """QuotaExceeded, if the tenant, of whose versions `kept` has all, would keep more than this key may let it."""
    kept = [version for version in kept if tenant_of(version.name) == tenant_of(name)]
    if any(version.name == name and version.digest == digest for version in kept):
        return
    if quota.adapters is not None and len({version.name for version in kept} | {name}) > quota.adapters:
        raise QuotaExceeded(f"this key's tenant may keep {quota.adapters} adapters: delete one that nobody uses")
    nbytes += sum(version.nbytes for version in kept)
    if quota.adapter_bytes is not None and nbytes > quota.adapter_bytes:
        raise QuotaExceeded(
            f"with this one the tenant's adapters take {nbytes} bytes, and this key may let them take "
            f"{quota.adapter_bytes}: delete versions that nobody uses"
        )


def check_pin(registry: Registry, name: str, pinned: Collection[str], places: int) -> None:
    """Conflict or QuotaExceeded, if `name` finds no place beside the names that are `pinned` on its base."""
    if len({*pinned, name}) > places:
        raise Conflict(
            f"{places} adapters are pinned, as many as this engine holds beside one that comes and goes: "
            "unpin one, or raise max_cpu_loras"
        )
    tenant = tenant_of(name)
    most = max(1, places // PINS_OF_A_TENANT)
    mine = {other for other in registry.pinned_names() if tenant_of(other) == tenant} | {name}
    if tenant != DEFAULT and len(mine) > most:
        raise QuotaExceeded(f"tenant {tenant} may pin {most} of its adapters: unpin one that it needs less")
