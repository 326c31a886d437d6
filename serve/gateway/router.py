"""A public model name and a Caller become a lease on a ready engine with that adapter version resident, or a 404."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Scope

from serve.adapters.adapter import Adapter
from serve.adapters.mixing.folders import AdapterFolders
from serve.adapters.mixing.mixture import Mixture, Part, is_mixture, mixed, parse
from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.auth.auth import Caller
from serve.engine.dp_ranks import opening
from serve.engine.engine import Engine, Lease
from serve.engine.fleet import Fleet
from serve.engine.payer import Payer
from serve.engine.supervisor import Supervisor
from serve.errors import BadRequest, EngineUnavailable, NotFound
from serve.fleet.membership import Peer
from serve.gateway.forwarding import Forwarding
from serve.names import shown, spelled, tenant_of
from serve.rollout.canary.askers import Asker, Askers
from serve.rollout.canary.traffic_split import Draw, Shares


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the engine, the name it knows the model by, and what that is for the metrics.

    `dealt` says that it asked for a name, and was given whichever version it has; `asker` who asked, if that is known,
    and `draw` names the draw that chose between the versions, if that is anything else.
    """

    lease: Lease
    adapter: str
    version: str
    shadow: Adapter | None = None
    dealt: bool = False
    asker: bytes | None = None
    draw: bytes | None = None
    # The asker with its conversation.
    who: Asker = Asker(None)
    # How the version was chosen: live, canary, pinned (asked for by number), or base.
    role: str = ""

    @property
    def engine(self) -> Engine:
        return self.lease.engine

    @property
    def model(self) -> str:
        return self.lease.model

    @property
    def load_seconds(self) -> float:
        return self.lease.load_seconds

    @property
    def app(self) -> ASGIApp:
        return self.engine.backend.app


def _nobody(adapter: str, version: str) -> None:
    """Nobody wants to know who is addressed."""


class Router:
    """With `shared`, other servers answer requests of the same conversations."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        store: Store,
        used: Callable[[str], None] = lambda adapter_id: None,
        forwarding: Forwarding | None = None,
        shared: bool = False,
    ) -> None:
        # Sends requests on to the servers that their adapters are at home on.
        self.forwarding = forwarding
        self.fleet = fleet
        self.registry = registry
        # Hears of every request for an adapter.
        self._used = used
        self._shares = Shares(shared=shared)
        self._folders = AdapterFolders(store, lambda id: any(base.engine.holds(id) for base in fleet))
        self._askers = Askers()

    @asynccontextmanager
    async def lease(
        self,
        model: str | None,
        caller: Caller,
        payer: Payer,
        fields: Mapping[str, Any] | None = None,
        seats: int = 1,
        addressed: Callable[[str, str], None] = _nobody,
    ) -> AsyncIterator[Route]:
        """The route for `model` (None: the first base), held until the block ends. `fields` is the request.

        The name means what it means to `caller`; the turn that it waits for, and the cost, are `payer`'s.
        `addressed(adapter, version)` hears who is to answer before the request waits for anything.
        """
        async with AsyncExitStack() as held:
            yield await self._leased(model, caller, payer, fields or {}, seats, held, addressed)

    def chosen(self, models: Sequence[str | None], caller: Caller) -> str | None:
        """The first of these that exists and whose engine serves now; else the first that exists. NotFound for none."""
        there: list[str | None] = []
        for name in models:
            with suppress(NotFound):
                if self.base_of(name, caller).is_available:
                    return name
                there.append(name)
        if there:
            return there[0]
        names = ", ".join(f"`{shown(name, 80)}`" for name in models)
        message = f"None of the models {names} exists: GET /v1/models lists those that do."
        raise NotFound(message, code="model_not_found", param="models")

    def knows(self, model: str, caller: Caller) -> bool:
        """Whether the name means anything to this caller now."""
        try:
            self.answerer(model, caller)
        except NotFound:
            return False
        return True

    def peer(self, model: str | None, caller: Caller, scope: Scope) -> Peer | None:
        """The other server that is to answer this request; None if this one is. NotFound as `resolve`.

        A mixture has no home: any server makes it of its parts. What was rolled back here, and nowhere else yet, is
        answered here.
        """
        if self.forwarding is None:
            return None
        adapter = self.answerer(model, caller)
        if adapter is None or adapter.is_mixed or adapter.name in self.registry.standing:
            return None
        return self.forwarding.peer(scope, adapter)

    def answered(self, response_id: str, route: Route) -> None:
        """A request that names this stored response as the one before goes on with the same conversation."""
        self._askers.remember(response_id, route.who)

    async def _leased(
        self,
        model: str | None,
        caller: Caller,
        payer: Payer,
        fields: Mapping[str, Any],
        seats: int,
        held: AsyncExitStack,
        addressed: Callable[[str, str], None],
    ) -> Route:
        """The route, its lease on `held`; from the next engine, if one dies before it is this request's turn."""
        asker = self._askers.of(fields, caller.tenant, caller.key)
        draws: dict[int, Draw] = {}
        while True:
            while not (supervisor := self.base_of(model, caller)).is_available:
                addressed(*_labels(self.answerer(model, caller), supervisor))
                await supervisor.available()
            # No await between the look-up and the lease, or a swap could come between.
            adapter = live = self.answerer(model, caller)
            shadow, draw = None, None
            dealt = adapter is not None and model is not None and "@" not in model and not adapter.is_mixed
            if adapter and dealt:  # a version that was asked for by number is never dealt away
                adapter, shadow, draw = self._split_traffic(adapter, asker, draws)
            labels = _labels(adapter, supervisor)
            addressed(*labels)
            engine = supervisor.engine
            if adapter and not engine.holds(adapter.id) and not self._folders.has(adapter):
                await self._folders.bring(adapter)
                continue
            path = self._folders.path(adapter, engine) if adapter else None
            id = adapter.id if adapter else None
            begins = opening(fields) if engine.backend.ranks > 1 else ""
            priority = fields.get("priority") or 0
            turn = engine.lease(id, path, payer=payer, priority=priority, opening=begins, sequences=seats)
            try:
                lease = await held.enter_async_context(turn)
            except EngineUnavailable:
                if not engine.failing():
                    raise
                continue
            if adapter and not adapter.is_mixed:
                self._used(adapter.id)
            role = _role(adapter, live if dealt else None)
            return Route(lease, *labels, shadow, dealt, asker.key, draw, asker, role)

    def names_of(self, model: str | None, caller: Caller) -> list[str]:
        """The full names of the adapters that `model` means, or the name of a base; NotFound as `answerer`."""
        adapter = self.answerer(model, caller)
        return adapter.names if adapter else [self.fleet.get(model).name]

    def base_of(self, model: str | None, caller: Caller) -> Supervisor:
        """Whose engine answers for `model`; NotFound as `answerer`."""
        adapter = self.answerer(model, caller)
        return self.fleet.of(adapter.names[0]) if adapter else self.fleet.get(model)

    def _split_traffic(
        self, live: Adapter, asker: Asker, draws: dict[int, Draw]
    ) -> tuple[Adapter, Adapter | None, bytes | None]:
        """Who answers a request for the live version, who answers it again, unseen, and the draw that chose.

        `draws` has those of this request until now, by the candidate's version: it is drawn once.
        """
        name, draw = live.name, None
        canary, shadow = self.registry.canary(name), self.registry.shadow(name)
        if canary:
            version = canary.adapter.version
            dealt = draws.get(version) or self._shares.deal(name, version, canary.weight, asker)
            draws[version] = dealt
            draw = dealt.name
            if dealt.taken:
                return canary.adapter, None, draw
        if shadow and self._shares.takes(name, shadow.adapter.version, shadow.weight, None, "shadow"):
            return live, shadow.adapter, draw
        return live, None, draw

    def answerer(self, model: str | None, caller: Caller) -> Adapter | None:
        """As `resolve`, of mixtures too: their parts are what each name means to this caller now."""
        try:
            return self.resolve(model, caller)
        except NotFound:
            if model is None or not is_mixture(model):
                raise
        return self.mixture(parse(model), caller)

    def mixture(self, named: Sequence[tuple[str, float]], caller: Caller) -> Mixture:
        """The mixture of these names, with their weights."""
        parts = []
        for name, weight in named:
            adapter = self.resolve(name, caller)
            if adapter is None:
                raise BadRequest(
                    f"`{shown(name, 80)}` is a base model, which every answer has in it: leave it out of the mixture",
                    param="model",
                )
            parts.append(Part(adapter, weight))
        bases = {self.fleet.of(part.adapter.name) for part in parts}
        if len(bases) > 1:
            names = " and ".join(sorted(base.name for base in bases))
            raise BadRequest(f"the adapters of this mixture are of different bases, {names}", param="model")
        return mixed(parts, caller.tenant, bases.pop().backend.max_lora_rank)

    def resolve(self, model: str | None, caller: Caller) -> Adapter | None:
        """The adapter version that a public name means to this caller now; None for the base model.

        What the caller may not see does not exist.
        """
        if model is None or model in self.fleet:
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


def _labels(adapter: Adapter | None, supervisor: Supervisor) -> tuple[str, str]:
    """How metrics name who answers."""
    return adapter.labels if adapter else (supervisor.name, "base")


def _role(adapter: Adapter | None, live: Adapter | None) -> str:
    """How traces name the choice: `live` is the version that has the name, None if a number was asked for."""
    if adapter is None:
        return "base"
    if adapter.is_mixed:
        return "mixed"
    if live is None:
        return "pinned"
    return "live" if adapter is live else "canary"


def sees(registry: Registry, caller: Caller, full: str) -> bool:
    """The caller may ask the adapter of this full name."""
    return manages(caller, full) or registry.shared(full)


def manages(caller: Caller, full: str) -> bool:
    """The adapter of this full name is the caller's to change, as far as the tenant goes."""
    return caller.operator or tenant_of(full) == caller.tenant
