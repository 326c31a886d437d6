"""`/openapi.json`, and `/docs`: one page for people, made here from the same document.

Neither needs a key, as the dashboard's page does not: they say what every server of this version can do, and nothing of
this one. Nothing is fetched from elsewhere, and no script runs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.dashboard.pages import HEADERS
from serve.api.reference.inference import with_inference
from serve.api.reference.page import page

_STYLE = (Path(__file__).parent / "reference.css").read_bytes()


class _Reference:
    """The document and the page of one app, made when somebody asks for the first time."""

    def __init__(self) -> None:
        self._made: tuple[bytes, bytes] | None = None
        self._making = asyncio.Lock()

    async def of(self, document: Callable[[], dict[str, Any]]) -> tuple[bytes, bytes]:
        async with self._making:
            if self._made is None:
                self._made = await asyncio.to_thread(_make, document)
            return self._made


def reference_pages() -> APIRouter:
    """The routes of both, and the page's style."""
    router, reference = APIRouter(include_in_schema=False), _Reference()

    @router.get("/openapi.json")
    async def openapi_json(request: Request) -> Response:
        document, _ = await reference.of(request.app.openapi)
        return Response(document, media_type="application/json")

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        _, html = await reference.of(request.app.openapi)
        return Response(html, headers={**HEADERS, "Content-Type": "text/html; charset=utf-8"})

    @router.get("/docs/reference.css")
    async def style() -> Response:
        return Response(_STYLE, headers={**HEADERS, "Content-Type": "text/css; charset=utf-8"})

    return router


def _make(document: Callable[[], dict[str, Any]]) -> tuple[bytes, bytes]:
    whole = with_inference(document())
    return json.dumps(whole).encode(), page(whole).encode()
