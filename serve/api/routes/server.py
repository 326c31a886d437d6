"""The server itself: is it well, what does it serve, its engines, its metrics, and alerts that come back to it."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.adapters.registry.registry import Registry
from serve.api.json_body import JsonBody
from serve.api.parts import (
    TheAlerts,
    TheAuto,
    TheConfig,
    TheFleet,
    TheHealth,
    TheHeartbeat,
    TheMetrics,
    TheRegistry,
    TheSwapFollower,
)
from serve.api.routes.callers import Asker, Gateway, Manager, Operator, Scraper
from serve.api.schemas import Swap
from serve.auth.auth import Caller
from serve.engine import base_swap
from serve.engine.base_swap import Approval, Handover
from serve.engine.fleet import Fleet
from serve.errors import BadRequest, ConfigError, NotFound
from serve.gateway.auto import AUTO
from serve.gateway.router import manages, sees
from serve.models.checkpoint import find
from serve.models.manifest import summary_of
from serve.names import DEFAULT, full_name, short_name, spelled, tenant_of
from serve.rollout.alertmanager import Notification

router = APIRouter()
# OpenMetrics, if the scraper asks for it.
PROMETHEUS: dict[str, Any] = {"content": {"text/plain": {}, "application/openmetrics-text": {}}}


@router.get("/health", response_class=Response)
async def health() -> Response:
    """This process lives."""
    return Response()


@router.get("/ping", response_class=Response)
async def ping(fleet: TheFleet, health: TheHealth) -> Response:
    """SageMaker's: as `/ready`."""
    await is_ready(fleet, health)
    return Response()


@router.get("/ready")
async def is_ready(fleet: TheFleet, health: TheHealth) -> Response:
    """Every engine answers, and the registry was seen within `registry_stale_seconds`. `degraded` names what else does
    not work, if anything."""
    for base in fleet:
        if not base.is_ready:
            raise base.unavailable()
    health.check_registry()
    body: dict[str, Any] = {"status": "ready", "model": fleet.first.name}
    degraded = await asyncio.to_thread(lambda: health.degraded)
    return JSONResponse(body | {"degraded": degraded} if degraded else body)


@router.get("/version")
async def version(fleet: TheFleet) -> dict[str, Any]:
    """Versions of loradock and vLLM, which patches of vLLM are on, the first base, the manifest of its export."""
    backend = fleet.first.backend
    patches = {
        "on": sorted(name for name, reason in backend.patches.items() if not reason),
        "off": {name: reason for name, reason in sorted(backend.patches.items()) if reason},
    }
    versions = {
        "version": __version__,
        "vllm": backend.version,
        "vllm_patches": patches,
        "model": fleet.first.name,
    }
    manifest = await asyncio.to_thread(summary_of, fleet.first.model)
    return {**versions, "manifest": manifest} if manifest else versions


@router.get("/metrics", response_class=Response, responses={200: PROMETHEUS})
async def metrics(request: Request, caller: Scraper, metrics: TheMetrics) -> Response:
    """Ours, and the engine's."""
    metrics.tidy()
    text, kind = await asyncio.to_thread(metrics.render, request.headers.get("accept", ""))
    return Response(text, headers={"content-type": kind})


@router.get("/metrics/engine", response_class=Response, responses={200: PROMETHEUS})
async def engine_metrics(request: Request, caller: Scraper, metrics: TheMetrics) -> Response:
    """The engine's alone, as it has them, with the series that grows."""
    text, kind = await asyncio.to_thread(metrics.render_engine, request.headers.get("accept", ""))
    return Response(text, headers={"content-type": kind})


@router.get("/metrics/gateway", response_class=Response, responses={200: PROMETHEUS})
async def gateway_metrics(request: Request, caller: Gateway, metrics: TheMetrics) -> Response:
    """What a gateway's endpoint picker reads of `/metrics`, and no more; without a key if `open_gateway_metrics` is."""
    text, kind = await asyncio.to_thread(metrics.render_gateway, request.headers.get("accept", ""))
    return Response(text, headers={"content-type": kind})


@router.get("/v1/models")
async def models(caller: Asker, registry: TheRegistry, fleet: TheFleet, auto: TheAuto) -> dict[str, Any]:
    """OpenAI's list of models: the bases, each adapter by name and by version with its parent, and `auto`."""
    cards = await asyncio.to_thread(_cards, fleet, registry, caller, registry.names())
    if auto.is_there(caller):
        cards.append({**_card(AUTO), "root": AUTO, "parent": None})
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}")
async def model(name: str, caller: Asker, registry: TheRegistry, fleet: TheFleet) -> dict[str, Any]:
    """One model of that list."""
    short = name.partition("@")[0]
    meant = {spelled(short, caller.tenant), short, short.removeprefix(f"{DEFAULT}/")}
    for card in await asyncio.to_thread(_cards, fleet, registry, caller, [full for full in meant if full in registry]):
        if name == card["id"]:
            return card
    raise NotFound(f"The model `{name}` does not exist", code="model_not_found", param="model")


@router.get("/v1/engines")
async def engines(caller: Operator, fleet: TheFleet) -> dict[str, Any]:
    """Each base's engine: phase and why, model, memory, slots, queue, restarts, uptime, adapters in memory."""
    rows = []
    for base in fleet:
        # The backend answers behind what it computes, so the other numbers are read afterwards.
        resident = sorted(await base.resident_ids()) if base.is_ready else []
        rows.append({**base.described(), "resident": resident})
    return {"object": "list", "data": rows}


@router.get("/v1/replicas")
async def replicas(caller: Operator, heartbeat: TheHeartbeat) -> dict[str, Any]:
    """The servers that share this one's registry, and how far each has read it."""
    return {"object": "list", "data": heartbeat.living() if heartbeat else []}


@router.post("/v1/engines/{engine:path}/swap")
async def swap(
    engine: str,
    request: Request,
    caller: Operator,
    fleet: TheFleet,
    config: TheConfig,
    follower: TheSwapFollower,
    body: Annotated[Swap, JsonBody(Swap)],
) -> dict[str, Any]:
    """Replace the model under a base while requests go on; `drain_first` when both do not fit in memory.

    Other servers of the registry go over with this one, as far as both engines fit there."""
    request.state.subject = f"{engine} -> {body.model}"
    base = fleet.get(engine)
    try:
        model = await asyncio.to_thread(find, body.model, config.cache_dir)
    except ConfigError as error:
        raise BadRequest(str(error), param="model") from error
    approval = Approval.FORCED if body.force else Approval.MEASURED
    handover = Handover.DRAIN_FIRST if body.drain_first else Handover.BESIDE
    pace = follower.leading()
    return await base_swap.swap(base, model, by=caller.name, approval=approval, handover=handover, pace=pace)


@router.post("/v1/engines/{engine:path}/restart")
async def restart(engine: str, request: Request, caller: Operator, fleet: TheFleet) -> dict[str, Any]:
    """Start an engine again that is down."""
    request.state.subject = engine
    await fleet.get(engine).restart()
    return fleet.get(engine).described()


@router.post("/v1/alerts")
async def alerts(
    request: Request,
    caller: Manager,
    alerting: TheAlerts,
    health: TheHealth,
    body: Annotated[Notification, JsonBody(Notification)],
) -> dict[str, Any]:
    """Alertmanager's webhook."""
    health.check_started()
    rows = [
        await alerting.take(alert, may=manages(caller, alert.labels.get("adapter", "")), by=caller.name)
        for alert in body.alerts
    ]
    request.state.subject = ", ".join(f"{row['alert']}: {row['outcome']}" for row in rows)
    return {"object": "list", "data": rows}


def _cards(fleet: Fleet, registry: Registry, caller: Caller, names: Sequence[str]) -> list[dict[str, Any]]:
    return list(_model_cards(fleet, registry, caller, names))


def _card(id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": "loradock"}


def _model_cards(fleet: Fleet, registry: Registry, caller: Caller, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """OpenAI's model cards: the bases, then those of these adapters that the caller may ask, by name and by version."""
    for base in fleet:
        card = _card(base.name)
        # Its directory is the operators' to know.
        card["root"] = base.model if caller.operator else base.name
        card["parent"] = None
        if base.is_ready:
            card |= {"max_model_len": base.backend.max_model_len, "weights": base.backend.weights}
        yield {**card, "manifest": manifest} if (manifest := summary_of(base.model)) else card
    for full in names:
        if not sees(registry, caller, full):
            continue
        public = short_name(full, caller.tenant)
        if tenant_of(full) == DEFAULT and full_name(caller.tenant, full) in registry and caller.tenant != DEFAULT:
            public = f"{DEFAULT}/{full}"  # the caller's own adapter answers under the short name
        live, aliases = registry.live(full), registry.aliases(full)
        for adapter in registry.versions(full):
            ids = [public] if adapter == live else []
            ids += [f"{public}@v{adapter.version}"]
            ids += [f"{public}@{alias}" for alias, target in aliases.items() if target == adapter]
            for id in ids:
                yield {
                    **_card(id),
                    "created": int(adapter.created),
                    "root": adapter.id,
                    "parent": registry.base(full) or fleet.first.name,
                }
