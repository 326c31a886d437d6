"""What may be removed of a trainer's versions: it makes one at each step, and names none of the old ones again."""

from __future__ import annotations

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.names import tenant_of

# Beside a version's checks, where it was loaded from.
LOADED_FROM = "loaded_from"


def surplus_versions(registry: Registry, name: str, keep: int) -> list[Adapter]:
    """Versions beyond the newest `keep` that neither serve nor are what a rollback would make live, oldest first.

    What an alias names serves.
    """
    versions = registry.versions(name)
    shares = [share.adapter for share in (registry.canary(name), registry.shadow(name)) if share]
    serving = {adapter.version for adapter in (registry.live(name), registry.pinned(name), *shares) if adapter}
    serving |= {adapter.version for adapter in registry.aliases(name).values()}
    serving.add(registry.before(name) or 0)
    return [version for version in versions[: max(0, len(versions) - keep)] if version.version not in serving]


def unloaded_names(registry: Registry, tenant: str) -> list[str]:
    """The tenant's names that were unloaded, of which every version was loaded by path; the newest first.

    One of which a version was pushed, or that serves in any other way, is nobody's to remove unasked.
    """
    names = [name for name in registry.names() if tenant_of(name) == tenant and _is_unloaded(registry, name)]
    return sorted(names, key=lambda name: registry.versions(name)[-1].created, reverse=True)


def _is_unloaded(registry: Registry, name: str) -> bool:
    if registry.live(name) or registry.before(name) is None or registry.pinned(name) or registry.aliases(name):
        return False
    return all(LOADED_FROM in version.checks for version in registry.versions(name))
