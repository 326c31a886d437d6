"""Golden sets: what good answers of an adapter are, and how its versions did."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import PositiveInt

from serve.api.json_body import JsonBody
from serve.api.parts import TheGolden, TheMeters, ThePolicies, TheRegistry
from serve.api.routes.callers import Manager, TheAdapter, paying
from serve.api.schemas import GoldenRun
from serve.engine.payer import Cause
from serve.errors import BadRequest, NotFound
from serve.gateway.router import manages
from serve.names import short_name, tenant_of
from serve.rollout.golden.golden import Golden
from serve.rollout.golden.golden_set import GoldenSet, check

router = APIRouter()


@router.get("/v1/golden")
async def golden_sets(caller: Manager, registry: TheRegistry, golden: TheGolden) -> dict[str, Any]:
    """The golden sets of the adapters that the caller may change, without their cases."""
    await asyncio.to_thread(golden.results.refresh)
    names = [full for full in sorted(golden.results.sets) if manages(caller, full) and full in registry]
    described = await asyncio.to_thread(lambda: [(full, golden.results.described(full)) for full in names])
    rows = [{"object": "golden.set", "name": short_name(full, caller.tenant), **row} for full, row in described if row]
    return {"object": "list", "data": rows}


@router.put("/v1/adapters/{name:path}/golden")
async def put_golden(
    caller: Manager,
    adapter: TheAdapter,
    registry: TheRegistry,
    golden: TheGolden,
    meters: TheMeters,
    body: Annotated[GoldenSet, JsonBody(GoldenSet, lines="cases")],
) -> dict[str, Any]:
    """Keep a golden set for an adapter, and run it on the live version: prompts with what a good answer is.

    Each of `cases` has a `prompt` or `messages`, `max_tokens`, `temperature` (0 by default), and one of `equals`,
    `contains`, `regex`, `json_schema` or `judge`. It may come as JSON lines too (`application/jsonl`), a case a line.
    `shadow` has a judge grade a `share` of a shadow's answers, beside those that clients got.
    """
    full = adapter.full
    await asyncio.to_thread(check, body)
    for model, where in body.judges.items():
        try:
            golden.runner.resolve(model, tenant_of(full))
        except NotFound as missing:
            raise BadRequest(f"{where} has a judge that is not there: {missing.message}") from missing
    live = registry.live(full)
    with paying(meters, caller, Cause.GOLDEN) as payer:
        unanswered = await asyncio.to_thread(golden.put, full, body, caller, live)
        if live is not None:
            golden.runs.request(live, unanswered, "put", payer, unanswered=True)
    return await _described(golden, adapter.name, full)


@router.get("/v1/adapters/{name:path}/golden")
async def golden(adapter: TheAdapter, golden: TheGolden) -> dict[str, Any]:
    """The golden set of an adapter, with its cases."""
    full = adapter.full
    described = await _described(golden, adapter.name, full)
    document = await asyncio.to_thread(golden.results.golden, full)
    return {**described, **(document.described() if document else {})}


@router.delete("/v1/adapters/{name:path}/golden")
async def remove_golden(adapter: TheAdapter, golden: TheGolden) -> dict[str, Any]:
    """Remove the golden set of an adapter, with all outcomes."""
    if not await asyncio.to_thread(golden.remove, adapter.full):
        raise _missing(adapter.name)
    golden.runs.wake()
    return {"object": "golden.set", "name": adapter.name, "deleted": True}


@router.post("/v1/adapters/{name:path}/golden/run", status_code=202)
async def run_golden(
    caller: Manager,
    adapter: TheAdapter,
    golden: TheGolden,
    meters: TheMeters,
    body: Annotated[GoldenRun, JsonBody(GoldenRun, required=False)],
) -> dict[str, Any]:
    """Have a version answer its golden set again, in the gaps of traffic. The body may be left out."""
    version = adapter.version(body.version)
    adapter.about(f"@v{version.version}")
    await asyncio.to_thread(golden.results.refresh)
    document = await asyncio.to_thread(golden.results.golden, version.name)
    if document is None:
        raise _missing(adapter.name)
    with paying(meters, caller, Cause.GOLDEN) as payer:
        golden.runs.request(version, document.by_key, "asked", payer)
    return {"object": "golden.run", "name": adapter.name, "version": version.version, "cases": len(document.cases)}


@router.get("/v1/adapters/{name:path}/golden/results")
async def golden_results(
    caller: Manager,
    adapter: TheAdapter,
    registry: TheRegistry,
    policies: ThePolicies,
    golden: TheGolden,
    version: PositiveInt | None = None,
) -> dict[str, Any]:
    """Scores by version, how a canary does, and each case of one `version` (default: the live one).

    What was answered is shown to the adapter's own tenant alone; of an adapter whose guard refuses answers, to nobody.
    """
    full = adapter.full
    described = await _described(golden, adapter.name, full)
    asked = registry.get(full, version) if version else registry.live(full)
    running = asked is not None and golden.runs.waiting(asked)  # before the report: what it lacks, runs
    report = await asyncio.to_thread(golden.results.report, full)
    answer = {"object": "golden.results", "name": adapter.name, "set": described["digest"], **report}
    answer["canary"] = golden.verdicts.report(full)
    if asked is None:
        return answer
    own = caller.tenant == tenant_of(full) and not policies[full].guard.withholds
    cases = await asyncio.to_thread(golden.results.cases, asked, answers=own)
    return {**answer, "version": asked.version, "running": running, "cases": cases}


async def _described(golden: Golden, name: str, full: str) -> dict[str, Any]:
    await asyncio.to_thread(golden.results.refresh)
    described = await asyncio.to_thread(golden.results.described, full)
    if described is None:
        raise _missing(name)
    return {"object": "golden.set", "name": name, **described}


def _missing(name: str) -> NotFound:
    return NotFound(
        f"{name} has no golden set: `loradock golden put {name} FILE`, or PUT one to /v1/adapters/{name}/golden",
        param="name",
    )
