"""OpenAI's fine-tuning jobs: examples in a file become a version of an adapter. A job is its tenant's alone."""

import asyncio
import re
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request

from serve.api.json_body import JsonBody
from serve.api.parts import TheFineTuning
from serve.api.routes.callers import Manager
from serve.api.schemas import FineTuningMethod, Hyperparameters, NewFineTuningJob
from serve.auth.auth import Caller
from serve.errors import BadRequest
from serve.jobs.batches.batches import check_metadata
from serve.jobs.finetuning.finetuning import FineTuning
from serve.jobs.finetuning.objects import Job

router = APIRouter()

_METADATA = re.compile(r"metadata\[(.{1,64})\]")
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/fine_tuning/jobs")
async def create_job(
    request: Request,
    caller: Manager,
    fine_tuning: TheFineTuning,
    body: Annotated[NewFineTuningJob, JsonBody(NewFineTuningJob, strict=True)],
) -> dict[str, Any]:
    """Train an adapter on the examples of a file, behind every client.

    `model` is a base, or an adapter of this tenant (or one of its versions) to go on from; `suffix` is the name of the
    adapter that the result is a version of. The file has OpenAI's chat format, prompts with completions, or, for
    `dpo`, preferences; at least 10 examples.
    """
    method = body.method or FineTuningMethod("supervised")
    job = await asyncio.to_thread(
        fine_tuning.create,
        caller,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        method=method.type,
        hyperparameters=_hyperparameters(body, method),
        seed=body.seed,
        metadata=body.metadata,
    )
    request.state.subject = job.id
    fine_tuning.schedule.wake()
    return job.described()


@router.get("/v1/fine_tuning/jobs")
async def jobs(
    request: Request, caller: Manager, fine_tuning: TheFineTuning, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """The tenant's jobs, the latest first; `metadata[KEY]=VALUE` leaves out those that do not say so."""
    wanted = {named[1]: value for name, value in request.query_params.items() if (named := _METADATA.fullmatch(name))}
    check_metadata(wanted)
    rows = fine_tuning.rows
    page = await asyncio.to_thread(rows.page, caller.tenant, after=after, limit=limit, metadata=wanted)
    return page.described()


@router.get("/v1/fine_tuning/jobs/{id}")
async def job(id: str, caller: Manager, fine_tuning: TheFineTuning) -> dict[str, Any]:
    """One job: where it is, and at the end the model that it made, or why there is none."""
    return (await asyncio.to_thread(fine_tuning.rows.get, caller.tenant, id)).described()


@router.post("/v1/fine_tuning/jobs/{id}/cancel")
async def cancel_job(id: str, request: Request, caller: Manager, fine_tuning: TheFineTuning) -> dict[str, Any]:
    """End a job; nothing of its training is kept."""
    return await _changed(request, caller, fine_tuning, id, fine_tuning.cancel)


@router.post("/v1/fine_tuning/jobs/{id}/pause")
async def pause_job(id: str, request: Request, caller: Manager, fine_tuning: TheFineTuning) -> dict[str, Any]:
    """Stop training for now; `resume` goes on from there."""
    return await _changed(request, caller, fine_tuning, id, fine_tuning.rows.pause)


@router.post("/v1/fine_tuning/jobs/{id}/resume")
async def resume_job(id: str, request: Request, caller: Manager, fine_tuning: TheFineTuning) -> dict[str, Any]:
    """Put a paused job in the queue again."""
    return await _changed(request, caller, fine_tuning, id, fine_tuning.rows.resume)


async def _changed(
    request: Request, caller: Caller, fine_tuning: FineTuning, id: str, change: Callable[[str, str], Job]
) -> dict[str, Any]:
    request.state.subject = id
    job = await asyncio.to_thread(change, caller.tenant, id)
    fine_tuning.schedule.wake(id)
    return job.described()


@router.get("/v1/fine_tuning/jobs/{id}/events")
async def job_events(
    id: str, caller: Manager, fine_tuning: TheFineTuning, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """What happened to a job and what its steps measured, the latest first."""
    await asyncio.to_thread(fine_tuning.rows.get, caller.tenant, id)
    return (await asyncio.to_thread(fine_tuning.notes.events, id, after=after, limit=limit)).described()


@router.get("/v1/fine_tuning/jobs/{id}/checkpoints")
async def job_checkpoints(
    id: str, caller: Manager, fine_tuning: TheFineTuning, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """The versions that the last epochs became, once the job has succeeded."""
    await asyncio.to_thread(fine_tuning.rows.get, caller.tenant, id)
    return (await asyncio.to_thread(fine_tuning.notes.checkpoints, id, after=after, limit=limit)).described()


def _hyperparameters(body: NewFineTuningJob, method: FineTuningMethod) -> dict[str, Any]:
    """Those that the method says, or the body itself, as earlier clients do."""
    other = {"supervised": method.dpo, "dpo": method.supervised}[method.type]
    if other is not None:
        raise BadRequest(f"method.type is {method.type}: leave the other method's options out", param="method")
    options = getattr(method, method.type)
    if options is not None and body.hyperparameters is not None:
        raise BadRequest("send hyperparameters below `method` alone", param="hyperparameters")
    asked = options.hyperparameters if options else body.hyperparameters or Hyperparameters()
    fields: dict[str, Any] = msgspec.to_builtins(asked)
    return fields
