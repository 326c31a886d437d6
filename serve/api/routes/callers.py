"""What every route begins with: who asks, what for, and whether the adapter is theirs to change."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

from fastapi import Depends, Request

from serve.adapters.adapter import Adapter
from serve.adapters.provenance import measured, provenance_of
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.snapshot import Share
from serve.api.parts import TheAuth, TheConfig, TheFleet, TheFollower, TheRegistry
from serve.auth.auth import Caller, Scope, allowed
from serve.auth.rate_limits import Meters
from serve.engine.fleet import Fleet
from serve.engine.payer import Cause, Payer
from serve.errors import BadRequest, Conflict, NotFound
from serve.gateway.router import manages
from serve.names import short_name, shown, spelled, tenant_of


class ScopeCheck:
    """The dependency that gives a route its caller, who must hold `scope`; `open_to_gateways`: or anybody, where the
    configuration says so."""

    def __init__(self, scope: Scope, *, open_to_gateways: bool = False) -> None:
        self.scope = scope
        self._open_to_gateways = open_to_gateways

    async def __call__(self, request: Request, auth: TheAuth, follower: TheFollower, config: TheConfig) -> Caller:
        if self._open_to_gateways and config.open_gateway_metrics:
            return Caller("gateway", frozenset({self.scope}))
        if follower:
            await follower.fresh()
            if self.scope is not Scope.METRICS:  # they tell of it
                follower.check_age()
        request.state.caller = known = auth.known(request.headers)
        return allowed(known, self.scope)


async def matched(request: Request) -> int | None:
    return live_expected(request.headers.get("if-match"))


Asker = Annotated[Caller, Depends(ScopeCheck(Scope.INFERENCE))]
Manager = Annotated[Caller, Depends(ScopeCheck(Scope.ADAPTERS))]
Scraper = Annotated[Caller, Depends(ScopeCheck(Scope.METRICS))]
Operator = Annotated[Caller, Depends(ScopeCheck(Scope.ADMIN))]
Worker = Annotated[Caller, Depends(ScopeCheck(Scope.WORK))]
Gateway = Annotated[Caller, Depends(ScopeCheck(Scope.METRICS, open_to_gateways=True))]
# The version that must be live for a change to be made; every change to an adapter takes it.
Expected = Annotated[int | None, Depends(matched)]


def owned(registry: Registry, name: str, caller: Caller) -> str:
    """The full name of an adapter that the caller may change; of any other, whatever it is, the same 404."""
    full = spelled(name, caller.tenant)
    if (now := registry.moved_to(full)) and manages(caller, full):
        short = short_name(now, caller.tenant)
        raise NotFound(f"The adapter `{shown(name)}` is called `{short}` now.", code="renamed", param="name")
    if full not in registry or not manages(caller, full):
        raise NotFound(f"The adapter `{shown(name)}` does not exist.", code="model_not_found", param="name")
    return full


class OneAdapter:
    """The adapter that the path of a request names, as its caller may see and change it.

    What the audit log says the request is about is the adapter, whatever becomes of it.
    """

    def __init__(self, name: str, request: Request, caller: Caller, registry: Registry, fleet: Fleet) -> None:
        self.name = name
        self.caller = caller
        self.registry = registry
        self.fleet = fleet
        self._request = request
        self.about("")

    def about(self, more: str) -> None:
        """The request is about this of the adapter."""
        self._request.state.subject = spelled(self.name, self.caller.tenant) + more

    @property
    def full(self) -> str:
        """Its full name; NotFound, if the caller may not change it."""
        return owned(self.registry, self.name, self.caller)

    def version(self, number: int | None) -> Adapter:
        """The version of this number; without one the live version, or Conflict if there is none."""
        full = self.full
        if number is None and (live := self.registry.live(full)):
            return live
        if number is None:
            raise Conflict("no version of this adapter is live: say which one is meant", param="version")
        return self.registry.get(full, number)

    def described(self, version: Adapter) -> dict[str, Any]:
        return described(self.registry, self.fleet, version, self.caller)

    def summary(self, full: str) -> dict[str, Any]:
        """What the answer to a change says; `full` is its name now."""
        return summary(self.registry, self.fleet, full, self.caller)


async def _one_adapter(
    name: str, request: Request, caller: Manager, registry: TheRegistry, fleet: TheFleet
) -> OneAdapter:
    return OneAdapter(name, request, caller, registry, fleet)


TheAdapter = Annotated[OneAdapter, Depends(_one_adapter)]


def described(registry: Registry, fleet: Fleet, adapter: Adapter, caller: Caller) -> dict[str, Any]:
    """An adapter version as the caller may see it: where a base model's files are is the operators' to know."""
    engine = registry.base(adapter.name) or fleet.first.name
    checks = measured(adapter.checks)
    if "base_model" in checks and not caller.operator:
        checks["base_model"] = engine
    return {
        "object": "adapter.version",
        "name": short_name(adapter.name, caller.tenant),
        "tenant": adapter.tenant,
        "visibility": "shared" if registry.shared(adapter.name) else "private",
        "version": adapter.version,
        "id": adapter.id,
        "digest": adapter.digest,
        "engine": engine,
        "live": registry.live(adapter.name) == adapter,
        "pinned": registry.pinned(adapter.name) == adapter,
        "resident": any(base.holds(adapter.id) for base in fleet),
        "base": adapter.base,
        "rank": adapter.rank,
        "target_modules": list(adapter.target_modules),
        "bytes": adapter.nbytes,
        "created": int(adapter.created),
        "aliases": [alias for alias, target in registry.aliases(adapter.name).items() if target == adapter],
        "tags": list(adapter.tags),
        "provenance": provenance_of(adapter.checks),
        "checks": checks,
    }


def summary(registry: Registry, fleet: Fleet, full: str, caller: Caller) -> dict[str, Any]:
    live = registry.live(full)
    return {
        "object": "adapter",
        "name": short_name(full, caller.tenant),
        "tenant": tenant_of(full),
        "visibility": "shared" if registry.shared(full) else "private",
        "live": live.version if live else None,
        "canary": _share(registry.canary(full)),
        "shadow": _share(registry.shadow(full)),
        "former_names": [short_name(old, caller.tenant) for old in registry.former_names(full)],
        "aliases": {alias: version.version for alias, version in registry.aliases(full).items()},
        "versions": [described(registry, fleet, version, caller) for version in registry.versions(full)],
    }


def _share(share: Share | None) -> dict[str, Any] | None:
    return {"version": share.adapter.version, "weight": share.weight} if share else None


def live_expected(header: str | None) -> int | None:
    """The version that an If-Match names, as this server's ETags do; 0 for none; None if it leaves that open."""
    if header is None or header.strip() == "*":
        return None
    number = header.strip().strip('"').removeprefix("v")
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise BadRequest(
            f'If-Match takes the version that is live now, for instance "3", or "0" for none; not {shown(header)}',
            param="if-match",
        )
    return int(number)


def agreed(asked: int | None, matching: int | None) -> int | None:
    """What the body expects to be live, or the header."""
    if None not in (asked, matching) and asked != matching:
        raise BadRequest(f"expected_version is {asked} and If-Match {matching}: send one", param="expected_version")
    return matching if asked is None else asked


@contextmanager
def paying(meters: Meters, caller: Caller, cause: Cause) -> Iterator[Payer]:
    """Work in the background on the caller's key: it counts as one request, and its tokens are charged as they come."""
    payer = Payer.of(caller, cause, meters)
    with payer.meter.request() if payer.meter else nullcontext():
        yield payer
