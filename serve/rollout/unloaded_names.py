"""Which names were loaded by path and unloaded again: a trainer loads a new one at each step, and names none twice."""

from __future__ import annotations

from serve.adapters.registry import Registry
from serve.names import tenant_of

# Beside a version's checks, where it was loaded from.
LOADED_FROM = "loaded_from"


def unloaded_names(registry: Registry, tenant: str) -> list[str]:
    """The tenant's names that were unloaded, of which every version was loaded by path; the newest first.

    One of which a version was pushed, or that serves in any other way, is nobody's to remove unasked.
    """
    names = [name for name in registry.names() if tenant_of(name) == tenant and _is_unloaded(registry, name)]
    return sorted(names, key=lambda name: registry.versions(name)[-1].created, reverse=True)


def _is_unloaded(registry: Registry, name: str) -> bool:
    if registry.live(name) or registry.before(name) is None or registry.pinned(name):
        return False
    return all(LOADED_FROM in version.checks for version in registry.versions(name))
