"""OpenAI's batches: a file of requests is answered in the gaps of traffic. A batch is its tenant's alone."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from serve.api.json_body import JsonBody
from serve.api.parts import TheBatches
from serve.api.routes.callers import Asker
from serve.api.schemas import NewBatch

router = APIRouter()


@router.post("/v1/batches")
async def create_batch(
    request: Request, caller: Asker, batches: TheBatches, body: Annotated[NewBatch, JsonBody(NewBatch, strict=True)]
) -> dict[str, Any]:
    """Have the requests of a file answered, on the rights and limits of this key, behind every client.

    `endpoint` is that of each line: /v1/chat/completions, /v1/completions, /v1/embeddings or /v1/responses.
    """
    expires = body.output_expires_after
    batch = await asyncio.to_thread(
        batches.create,
        caller,
        input_file=body.input_file_id,
        endpoint=body.endpoint,
        window=body.completion_window,
        metadata=body.metadata,
        file_seconds=expires.seconds if expires else None,
    )
    request.state.subject = batch.id
    batches.schedule.wake()
    return batch.described()


@router.get("/v1/batches")
async def batches(
    caller: Asker,
    batches: TheBatches,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """The tenant's batches, the latest first; the next page begins `after` the `last_id` of this one."""
    page = await asyncio.to_thread(batches.rows.page, caller.tenant, after=after, limit=limit)
    return page.described()


@router.get("/v1/batches/{id}")
async def batch(id: str, caller: Asker, batches: TheBatches) -> dict[str, Any]:
    """One batch: where it is, how many lines are answered, and the ids of its output and its errors at the end."""
    return (await asyncio.to_thread(batches.rows.get, caller.tenant, id)).described()


@router.post("/v1/batches/{id}/cancel")
async def cancel_batch(id: str, request: Request, caller: Asker, batches: TheBatches) -> dict[str, Any]:
    """Ask no more lines; what was answered until now is in its output file."""
    request.state.subject = id
    cancelled = await asyncio.to_thread(batches.rows.cancel, caller.tenant, id)
    batches.schedule.wake(id)
    return cancelled.described()
