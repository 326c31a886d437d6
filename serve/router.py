"""A public model name and a Caller become a lease on a ready engine with that adapter version resident, or a 404."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from serve.adapter import Adapter
from serve.auth import Caller
from serve.engine import Engine
from serve.errors import NotFound
from serve.registry import Registry
from serve.store import Store
from serve.tenant import spelled, tenant_of


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the backend's app, the name it knows the model by, and what that is for the metrics."""

    app: ASGIApp
    model: str
    adapter: str
    version: str


class Router:
    def __init__(self, engine: Engine, registry: Registry, store: Store) -> None:
        self.engine = engine
        self.registry = registry
        self.store = store

    @asynccontextmanager
    async def lease(self, model: str | None, caller: Caller) -> AsyncIterator[Route]:
        """The route for `model` (None: the base, as in vLLM), held until the block ends."""
        # No await between the look-up and the lease, or a swap could come between.
        adapter = self.resolve(model, caller)
        path = self.store.path(adapter.digest) if adapter else None
        async with self.engine.lease(adapter.id if adapter else None, path) as name:
            app = self.engine.backend.app
            yield Route(app, name, *((adapter.name, f"v{adapter.version}") if adapter else (self.engine.name, "base")))

    def resolve(self, model: str | None, caller: Caller) -> Adapter | None:
        """The adapter version that a public name means to this caller now; None for the base model.

        What the caller may not see does not exist.
        """
        if model is None or model == self.engine.name:
            return None
        for full in dict.fromkeys((spelled(model, caller.tenant), model)):
            try:
                adapter = self.registry.resolve(full)
            except NotFound:
                continue
            if sees(self.registry, caller, adapter.name):
                return adapter
        message = f"The model `{model}` does not exist: GET /v1/models lists those that do."
        raise NotFound(message, code="model_not_found", param="model")


def sees(registry: Registry, caller: Caller, full: str) -> bool:
    """The caller may ask the adapter of this full name."""
    return manages(caller, full) or registry.shared(full)


def manages(caller: Caller, full: str) -> bool:
    """The adapter of this full name is the caller's to change, as far as the tenant goes."""
    return caller.operator or tenant_of(full) == caller.tenant
