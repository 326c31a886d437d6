"""Loops: adapters that train, prove and promote their next version; seen, asked and stopped."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request

from serve.api.json_body import JsonBody
from serve.api.parts import TheCaptures, TheLoops, TheRegistry
from serve.api.routes.callers import Manager, OneAdapter, Operator, TheAdapter
from serve.api.schemas import LoopAnswer
from serve.gateway.router import manages
from serve.loop.loops import Loops
from serve.names import short_name

router = APIRouter()


@router.get("/v1/loops")
async def loops(caller: Manager, registry: TheRegistry, loops: TheLoops) -> dict[str, Any]:
    """The loops of all adapters that the caller may change."""
    names = {name for name in registry.names() if manages(caller, name)}
    rows = await asyncio.to_thread(loops.listed, names)
    found = [{"object": "adapter.loop", **row, "name": short_name(row["name"], caller.tenant)} for row in rows]
    return {"object": "list", "data": found}


@router.post("/v1/loops/stop")
async def stop_loops(request: Request, caller: Operator, loops: TheLoops) -> dict[str, Any]:
    """Stop every loop of every server that shares the registry: tries that go on end, and none is opened."""
    request.state.subject = "every loop"
    await asyncio.to_thread(loops.stop, None, caller.name)
    return {"object": "loops", "stopped": caller.name}


@router.post("/v1/loops/start")
async def start_loops(request: Request, caller: Operator, loops: TheLoops) -> dict[str, Any]:
    """Loops may go on, but for those that are stopped by themselves."""
    request.state.subject = "every loop"
    await asyncio.to_thread(loops.start, None)
    return {"object": "loops", "stopped": None}


@router.get("/v1/adapters/{name:path}/loop")
async def loop(adapter: TheAdapter, loops: TheLoops) -> dict[str, Any]:
    """Where an adapter's loop is, and its tries with their evidence."""
    return await _described(loops, adapter, adapter.full)


@router.post("/v1/adapters/{name:path}/loop/run", status_code=202)
async def run_loop(caller: Manager, adapter: TheAdapter, captures: TheCaptures, loops: TheLoops) -> dict[str, Any]:
    """Open a try now; the gate, the canary and the month's budget stay as the policy says."""

    def run(full: str) -> None:
        captures.datasets.must_learn(full)  # a try that has nothing to gather would be spent
        loops.run(full, caller.name)

    return await _asked(loops, adapter, run)


@router.post("/v1/adapters/{name:path}/loop/approve", status_code=202)
async def approve_loop(caller: Manager, adapter: TheAdapter, loops: TheLoops) -> dict[str, Any]:
    """Say yes to the candidate that waits for it: it becomes live."""
    return await _asked(loops, adapter, lambda full: loops.approve(full, caller.name))


@router.post("/v1/adapters/{name:path}/loop/reject", status_code=202)
async def reject_loop(
    request: Request,
    caller: Manager,
    adapter: TheAdapter,
    loops: TheLoops,
    body: Annotated[LoopAnswer, JsonBody(LoopAnswer, required=False)],
) -> dict[str, Any]:
    """End the try that goes on, whatever it does. The body may be left out."""
    request.state.reason = body.why
    return await _asked(loops, adapter, lambda full: loops.reject(full, caller.name, body.why))


@router.post("/v1/adapters/{name:path}/loop/stop")
async def stop_loop(caller: Manager, adapter: TheAdapter, loops: TheLoops) -> dict[str, Any]:
    """End the try that goes on, and open none until the loop is started again."""
    return await _asked(loops, adapter, lambda full: loops.stop(full, caller.name))


@router.post("/v1/adapters/{name:path}/loop/start")
async def start_loop(adapter: TheAdapter, loops: TheLoops) -> dict[str, Any]:
    """The loop may open tries again."""
    return await _asked(loops, adapter, loops.start)


@router.delete("/v1/adapters/{name:path}/loop/references/{id}")
async def drop_reference(id: str, adapter: TheAdapter, loops: TheLoops) -> dict[str, Any]:
    """Forget a reference with its examples: later candidates are not held against it any more."""
    return await _asked(loops, adapter, lambda full: loops.drop(full, id))


async def _asked(loops: Loops, adapter: OneAdapter, ask: Callable[[str], None]) -> dict[str, Any]:
    full = adapter.full
    await asyncio.to_thread(ask, full)
    return await _described(loops, adapter, full)


async def _described(loops: Loops, adapter: OneAdapter, full: str) -> dict[str, Any]:
    return {"object": "adapter.loop", "name": adapter.name, **await asyncio.to_thread(loops.described, full)}
