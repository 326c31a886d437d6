"""OpenAI's files: requests for batches, examples to train on, and results. A file is its tenant's alone, also for
operators."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from serve.api.incoming import stated_bytes
from serve.api.parts import TheFiles
from serve.api.routes.callers import Asker

router = APIRouter()

_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "Requests or examples as JSON lines."},
        "purpose": {"type": "string", "enum": ["batch", "fine-tune"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}


@router.post(
    "/v1/files",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload_file(request: Request, caller: Asker, stored_files: TheFiles) -> dict[str, Any]:
    """Keep JSON lines, as `file`: requests of a batch (`purpose=batch`) or examples to train on (`purpose=fine-tune`).

    It expires after 30 days.
    """
    kind = request.headers.get("content-type", "")
    file = await stored_files.upload(caller, request.stream(), kind, stated_bytes(request))
    request.state.subject = file.id
    return file.described()


@router.get("/v1/files")
async def files(
    caller: Asker,
    stored_files: TheFiles,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """The tenant's files, the latest first; the next page begins `after` the `last_id` of this one."""
    rows = stored_files.rows
    page = await asyncio.to_thread(
        rows.page, caller.tenant, after=after, limit=limit, ascending=order == "asc", purpose=purpose
    )
    return page.described()


@router.get("/v1/files/{id}")
async def file(id: str, caller: Asker, stored_files: TheFiles) -> dict[str, Any]:
    """One file, without its content."""
    return (await asyncio.to_thread(stored_files.rows.get, caller.tenant, id)).described()


@router.get("/v1/files/{id}/content", response_class=FileResponse)
async def file_content(id: str, caller: Asker, stored_files: TheFiles) -> FileResponse:
    """The content of a file."""
    stored, path = await asyncio.to_thread(stored_files.content, caller.tenant, id)
    return FileResponse(path, media_type="application/octet-stream", filename=stored.filename)


@router.delete("/v1/files/{id}")
async def delete_file(id: str, request: Request, caller: Asker, stored_files: TheFiles) -> dict[str, Any]:
    """Delete a file; 409 while a batch or a fine-tuning job reads it."""
    request.state.subject = id
    await asyncio.to_thread(stored_files.remove, caller.tenant, id)
    return {"id": id, "object": "file", "deleted": True}
