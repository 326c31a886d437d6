"""What moved: drift, baselines to hold it against, and ratings of answers."""

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import PositiveInt

from serve.adapters.adapter import Adapter
from serve.adapters.byte_ledger import Kind
from serve.api.json_body import JsonBody
from serve.api.parts import (
    TheBaselineBuild,
    TheCanaryMonitor,
    TheConfig,
    TheDriftMonitor,
    TheExchangeWorker,
    TheFleet,
    TheGolden,
    TheMessages,
    TheMeters,
    TheRatedAnswers,
    TheRegistry,
    TheShadowAgreement,
    TheStore,
)
from serve.api.rated_answers import RATE
from serve.api.routes.callers import Asker, Manager, OneAdapter, TheAdapter, paying
from serve.api.schemas import Accepted, Acknowledged, BaselinePrompts, Rating
from serve.asgi.exchange_worker import ExchangeWorker
from serve.drift.change_description import for_tenant
from serve.drift.monitor import DriftMonitor
from serve.engine.payer import Cause
from serve.errors import BadRequest, ConfigError, Conflict, NotFound
from serve.gateway.router import manages
from serve.names import short_name, tenant_of
from serve.rollout.canary.canary_monitor import CanaryMonitor

# What stands for a base where an adapter has its version.
BASE_LABEL = "base"

router = APIRouter()


@router.get("/v1/drift")
async def drift(
    caller: Manager,
    registry: TheRegistry,
    fleet: TheFleet,
    drift_monitor: TheDriftMonitor,
    exchange_worker: TheExchangeWorker,
) -> dict[str, Any]:
    """What has moved, of everything that the caller may change; the base is the operator's."""
    by_adapter = await asyncio.to_thread(drift_monitor.summary)
    rows = [
        {"name": short_name(full, caller.tenant), "versions": by_adapter[full]}
        for full in sorted(by_adapter)
        if (caller.operator if full in fleet else full in registry and manages(caller, full))
    ]
    false_alarms = drift_monitor.false_alarms()
    if not caller.operator:  # how much all tenants ask is the operators' to know
        false_alarms = {name: false_alarms[name] for name in ("requests_each_at_least", "text")}
    return {
        "object": "list",
        "watching": exchange_worker.running,
        "false_alarms": false_alarms,
        "data": rows,
    }


@router.get("/v1/adapters/{name:path}/drift")
async def adapter_drift(
    adapter: TheAdapter,
    golden: TheGolden,
    drift_monitor: TheDriftMonitor,
    canary_monitor: TheCanaryMonitor,
    shadow_agreement: TheShadowAgreement,
    exchange_worker: TheExchangeWorker,
) -> dict[str, Any]:
    """What moved, since when, how strongly; and how its canary does."""
    full = adapter.name if is_base(adapter) else adapter.full
    report = await _report(drift_monitor, canary_monitor, full, adapter)
    more = {"golden": golden.verdicts.report(full), "shadow": shadow_agreement.report(full)}
    return {**report, "watching": exchange_worker.running, **more}


@router.post("/v1/adapters/{name:path}/drift/acknowledge")
async def acknowledge(
    adapter: TheAdapter,
    drift_monitor: TheDriftMonitor,
    canary_monitor: TheCanaryMonitor,
    body: Annotated[Acknowledged, JsonBody(Acknowledged)],
) -> dict[str, Any]:
    """Its alarms have been dealt with: evidence begins again at nothing."""
    which = watched(adapter, body.version)
    await asyncio.to_thread(_asked, drift_monitor.acknowledge, *which.key)
    return await _report(drift_monitor, canary_monitor, which.name, adapter)


@router.post("/v1/adapters/{name:path}/drift/accept")
async def accept(
    request: Request,
    caller: Manager,
    adapter: TheAdapter,
    registry: TheRegistry,
    drift_monitor: TheDriftMonitor,
    canary_monitor: TheCanaryMonitor,
    body: Annotated[Accepted, JsonBody(Accepted)],
) -> dict[str, Any]:
    """What moved is here to stay: recent traffic becomes the reference, and what is missing of it is gathered."""
    which = watched(adapter, body.version)
    request.state.reason = f"{body.signals}: {body.note}" if body.note else body.signals
    prompts, answers = body.signals != "output", body.signals != "prompt"
    accept = partial(drift_monitor.accept, prompts=prompts, answers=answers)
    await asyncio.to_thread(_asked, accept, *which.key)
    if which.version:  # a base has no history but the audit log
        note = partial(registry.note, by=caller.name, why=request.state.reason)
        await asyncio.to_thread(note, which.name, "drift_accepted", which.version)
    return await _report(drift_monitor, canary_monitor, which.name, adapter)


@router.get(
    "/v1/adapters/{name:path}/drift/requests",
    response_class=Response,
    responses={200: {"content": {"application/jsonl": {}, "application/vnd.apache.parquet": {}}}},
)
async def moved_requests(
    adapter: TheAdapter,
    drift_monitor: TheDriftMonitor,
    config: TheConfig,
    version: PositiveInt | None = None,
    format: Literal["jsonl", "parquet"] = "jsonl",
) -> Response:
    """The requests since the change, the most moved first, as JSON lines or parquet; only with `capture`."""
    which = watched(adapter, version)
    if not config.capture:
        raise Conflict("this server keeps no requests: start it with `capture: true` to export those that moved")
    rows = await asyncio.to_thread(drift_monitor.moved_requests, which.name, which.id)
    if format == "parquet":
        return Response(await asyncio.to_thread(_parquet, rows), media_type="application/vnd.apache.parquet")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Response(lines, media_type="application/jsonl")


@router.post("/v1/adapters/{name:path}/baseline")
async def baseline(
    caller: Manager,
    adapter: TheAdapter,
    drift_monitor: TheDriftMonitor,
    exchange_worker: TheExchangeWorker,
    meters: TheMeters,
    baseline_build: TheBaselineBuild,
    body: Annotated[BaselinePrompts, JsonBody(BaselinePrompts)],
) -> dict[str, Any]:
    """A version's baseline, of what it answers to these prompts; it takes as long as the answers do."""
    which = baselined(adapter, body.version, exchange_worker)
    with paying(meters, caller, Cause.BASELINE) as payer:
        exchanges = await baseline_build.run(which, body.prompts, payer, max_tokens=body.max_tokens)
    label = f"v{which.version}"
    rows = await asyncio.to_thread(_asked, drift_monitor.build_baseline, which.name, label, which.id, exchanges)
    return {"object": "baseline", "name": adapter.name, "version": which.version, "requests": rows}


@router.get(
    "/v1/adapters/{name:path}/baseline",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}}},
)
async def saved_baseline(
    adapter: TheAdapter,
    drift_monitor: TheDriftMonitor,
    exchange_worker: TheExchangeWorker,
    version: PositiveInt | None = None,
) -> Response:
    """A version's baseline, to ship with the adapter."""
    which = baselined(adapter, version, exchange_worker)
    data = await asyncio.to_thread(_asked, drift_monitor.export_baseline, which.name, f"v{which.version}", which.id)
    return Response(data, media_type="application/zip")


@router.put(
    "/v1/adapters/{name:path}/baseline",
    openapi_extra={"requestBody": {"required": True, "content": {"application/zip": {"schema": {"type": "string"}}}}},
)
async def shipped_baseline(
    request: Request,
    adapter: TheAdapter,
    drift_monitor: TheDriftMonitor,
    store: TheStore,
    exchange_worker: TheExchangeWorker,
    version: PositiveInt | None = None,
) -> dict[str, Any]:
    """The baseline that came with the adapter."""
    which = baselined(adapter, version, exchange_worker)
    data = await request.body()
    await asyncio.to_thread(store.ledger.check, tenant_of(which.name), Kind.BASELINES, len(data))
    label = f"v{which.version}"
    rows = await asyncio.to_thread(_asked, drift_monitor.import_baseline, which.name, label, which.id, data)
    return {"object": "baseline", "name": adapter.name, "version": which.version, "requests": rows}


@router.post("/v1/feedback")
async def rate(
    request: Request,
    caller: Asker,
    rated_answers: TheRatedAnswers,
    messages: TheMessages,
    body: Annotated[Rating, JsonBody(Rating)],
) -> dict[str, Any]:
    """A rating of an answer, by its id. Those of the adapter's own tenant, and of tenants that its policy names, decide
    what becomes of its versions. Any server of the registry takes it."""
    request.state.audited = False
    try:
        return await rated_answers.rate(caller.tenant, caller.key, body.request_id, body.rating, body.answer)
    except NotFound:
        who = {"tenant": caller.tenant, "key": caller.key}
        told = await messages.ask(RATE, who | msgspec.structs.asdict(body)) if messages else None
        if told is None:
            raise
        return dict(told)


@dataclass(frozen=True, slots=True)
class Watched:
    """An adapter's version, or a base (version 0), as the monitor knows it."""

    name: str
    version: int = 0
    id: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, f"v{self.version}" if self.version else BASE_LABEL, self.id


def is_base(adapter: OneAdapter) -> bool:
    """The name is that of a base, whose drift is the operator's."""
    return adapter.name in adapter.fleet and adapter.caller.operator


def watched(adapter: OneAdapter, number: int | None) -> Watched:
    """Whose drift is meant: a base's, or that of this version; without a number, of the live one."""
    adapter.about(f"@v{number}" if number else "")
    if not is_base(adapter):
        version = adapter.version(number)
        return Watched(version.name, version.version, version.id)
    if number is not None:
        raise BadRequest(f"{adapter.name} is a base model and has no versions: leave the version out", param="version")
    return Watched(adapter.name)


def baselined(adapter: OneAdapter, number: int | None, exchange_worker: ExchangeWorker) -> Adapter:
    """The version that a baseline is about; without a number, the live one."""
    adapter.about(f"@v{number or '(live)'}")
    version = adapter.version(number)
    if not exchange_worker.running:
        raise Conflict("drift is not watched on this server, so there is nothing to build a baseline for")
    return version


async def _report(
    drift_monitor: DriftMonitor, canary_monitor: CanaryMonitor, full: str, adapter: OneAdapter
) -> dict[str, Any]:
    """Which tenants ask an adapter is the operators' to know; others see themselves."""
    caller = adapter.caller
    versions = await asyncio.to_thread(drift_monitor.report, full)
    if not caller.operator:
        versions = [
            {**each, "alarms": {kind: for_tenant(moved, caller.tenant) for kind, moved in each["alarms"].items()}}
            for each in versions
        ]
    canary = await asyncio.to_thread(canary_monitor.report, full)
    return {"object": "adapter.drift", "name": adapter.name, "versions": versions, "canary": canary}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadRequest(
            "this server cannot write parquet: pyarrow is not installed (`pip install pyarrow`); take format=jsonl",
            param="format",
        ) from error
    out = io.BytesIO()
    columns = {name: [row.get(name) for row in rows] for name in ("request_id", "when", "moved", "prompt", "answer")}
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def _asked(do: Callable[..., Any], *args: Any) -> Any:
    """What a baseline's own error says is, here, about the request."""
    try:
        return do(*args)
    except ConfigError as error:
        raise BadRequest(error.message) from error
