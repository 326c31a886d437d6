"""`/dashboard`: one page for people without Grafana, served as it lies here: nothing to build, nothing to fetch.

The page holds nothing: what it shows it asks the API for, with the key that its user gives it. The key stays in the
page's memory, and no other site is spoken to, which the headers tell the browser too.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_FOLDER = Path(__file__).parent
_JAVASCRIPT = "text/javascript; charset=utf-8"
_MODULES = (
    "page", "actions", "adapter", "addresses", "api", "cards", "charts", "dom", "grafana", "jobs", "lists", "loops",
    "playground", "strip", "verdicts",
)  # fmt: skip
_FILES = {
    "/dashboard": ("dashboard.html", "text/html; charset=utf-8"),
    **{f"/dashboard/{name}.js": (f"{name}.js", _JAVASCRIPT) for name in _MODULES},
    "/dashboard/page.css": ("page.css", "text/css; charset=utf-8"),
    "/dashboard/icon.svg": ("icon.svg", "image/svg+xml"),
}


def pages() -> APIRouter:
    """The routes of the page."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in _FILES.items():
        _serve(router, path, (_FOLDER / name).read_bytes(), kind)

    @router.get("/", name="/")
    async def front() -> Response:
        return RedirectResponse("/dashboard", headers=HEADERS)

    return router


def _serve(router: APIRouter, path: str, content: bytes, kind: str) -> None:
    @router.get(path, name=path)
    async def page() -> Response:
        return Response(content, headers={**HEADERS, "Content-Type": kind})
