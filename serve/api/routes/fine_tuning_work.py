"""What `loradock finetune worker` asks: it fetches jobs of any tenant, trains them elsewhere, and brings the results.

A worker has one job at a time, and loses it when it has said nothing for a minute; then everything that it asks about
the job is a 409.
"""

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from serve.api.incoming import stated_bytes
from serve.api.json_body import JsonBody
from serve.api.parts import TheConfig, TheFineTuning
from serve.api.routes.callers import Worker
from serve.api.schemas import AtWork, WorkAsked, WorkFailed, WorkNote, WorkProgress
from serve.jobs.finetuning.workers import CLAIM_SECONDS

router = APIRouter()

Name = Annotated[str, Query(max_length=31)]
_SETTLED = ("n_epochs", "batch_size", "rank", "learning_rate")
_BYTES = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}


@router.post("/v1/fine_tuning/work")
async def claim_work(
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    config: TheConfig,
    body: Annotated[WorkAsked, JsonBody(WorkAsked, strict=True)],
) -> dict[str, Any]:
    """Take a job to train, on a base that the worker has; `job` is null when there is none.

    `missing` are bases that jobs wait for, with the digests of their bytes; `ended` what the worker keeps in vain.
    """
    claim = fine_tuning.workers.claim
    offer = await asyncio.to_thread(claim, caller, body.worker, body.bases, body.kept, body.besides)
    request.state.audited = offer.job is not None
    request.state.subject = f"{offer.job.id if offer.job else 'nothing'} by {body.worker}"
    job = None if offer.job is None else msgspec.to_builtins(offer.job)
    more = {"missing": dict(offer.missing), "ended": list(offer.ended)}
    return {"job": job, "hours": config.finetune_hours, "claim_seconds": CLAIM_SECONDS, **more}


@router.post("/v1/fine_tuning/work/{id}/renew")
async def renew_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[AtWork, JsonBody(AtWork, strict=True)],
) -> dict[str, Any]:
    """Keep a job for another minute."""
    request.state.audited = False
    await asyncio.to_thread(fine_tuning.workers.renew, caller, body.worker, id)
    return {"id": id}


@router.post("/v1/fine_tuning/work/{id}/launch")
async def launch_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[AtWork, JsonBody(AtWork, strict=True)],
) -> dict[str, Any]:
    """Say that the job's process is about to start; the answer is how far the job is."""
    request.state.subject = f"{id} by {body.worker}"
    job = await asyncio.to_thread(fine_tuning.workers.launch, caller, body.worker, id)
    return {"job": msgspec.to_builtins(job)}


@router.post("/v1/fine_tuning/work/{id}/progress")
async def advance_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[WorkProgress, JsonBody(WorkProgress, strict=True)],
) -> dict[str, Any]:
    """Say what steps measured since the last time; the answer is how far the job is."""
    request.state.audited = False
    lines = [msgspec.structs.asdict(line) for line in body.lines]
    settled = {name: value for name in _SETTLED if (value := getattr(body, name)) is not None}
    advance = fine_tuning.workers.advance
    job = await asyncio.to_thread(advance, caller, body.worker, id, lines, body.seconds, settled)
    return {"job": msgspec.to_builtins(job)}


@router.post("/v1/fine_tuning/work/{id}/note")
async def note_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[WorkNote, JsonBody(WorkNote, strict=True)],
) -> dict[str, Any]:
    """Add an event to the job."""
    request.state.subject = f"{id} by {body.worker}"
    await asyncio.to_thread(fine_tuning.workers.note, caller, body.worker, id, body.message, body.level)
    return {"id": id}


@router.post("/v1/fine_tuning/work/{id}/fail")
async def fail_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[WorkFailed, JsonBody(WorkFailed, strict=True)],
) -> dict[str, Any]:
    """End the job: it cannot come to a good end."""
    request.state.subject = f"{id} by {body.worker}"
    fail = fine_tuning.workers.fail
    await asyncio.to_thread(fail, caller, body.worker, id, body.code, body.message, body.param, tuple(body.also))
    fine_tuning.schedule.wake()
    return {"id": id}


@router.post("/v1/fine_tuning/work/{id}/release")
async def release_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[AtWork, JsonBody(AtWork, strict=True)],
) -> dict[str, Any]:
    """Give the job back: another worker may train it, and this one later."""
    request.state.subject = f"{id} by {body.worker}"
    await asyncio.to_thread(fine_tuning.workers.release, caller, body.worker, id)
    fine_tuning.schedule.wake()
    return {"id": id}


@router.get("/v1/fine_tuning/work/{id}/files/{file:path}", response_class=FileResponse)
async def work_file(
    id: str, file: str, request: Request, caller: Worker, fine_tuning: TheFineTuning, worker: Name
) -> FileResponse:
    """A file that the job is trained with: training.jsonl, validation.jsonl, or the adapter below parent/."""
    request.state.audited, request.state.subject = True, f"{file} of {id} for {worker}"
    path = await fine_tuning.workers.file(caller, worker, id, file)
    return FileResponse(path, media_type="application/octet-stream")


@router.put("/v1/fine_tuning/work/{id}/files/{file:path}", openapi_extra=_BYTES)
async def put_work_file(
    id: str, file: str, request: Request, caller: Worker, fine_tuning: TheFineTuning, worker: Name
) -> dict[str, Any]:
    """Bring a file of the result: adapter/FILE, checkpoints/step-N/FILE, progress.jsonl or settings.json."""
    request.state.subject = f"{file} of {id} by {worker}"
    await fine_tuning.workers.put(caller, worker, id, file, request.stream(), stated_bytes(request))
    return {"id": id, "name": file}


@router.post("/v1/fine_tuning/work/{id}/done")
async def done_work(
    id: str,
    request: Request,
    caller: Worker,
    fine_tuning: TheFineTuning,
    body: Annotated[AtWork, JsonBody(AtWork, strict=True)],
) -> dict[str, Any]:
    """Say that the result is here whole: the server checks and admits it as what it trains itself."""
    request.state.subject = f"{id} by {body.worker}"
    await asyncio.to_thread(fine_tuning.workers.done, caller, body.worker, id)
    fine_tuning.schedule.wake()
    return {"id": id}
