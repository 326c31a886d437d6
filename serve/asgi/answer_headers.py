"""Headers of ours on every answer: the request's id, which version of an adapter gave it, and its span.

While the registry cannot be looked at, how old what the answer follows from is.
"""

from __future__ import annotations

from starlette.types import Message

from serve.asgi.trace_context import RequestTrace
from serve.names import short_name

REQUEST_ID = b"x-request-id"
# NAME@vN: what a trainer needs to know of an answer, and a model's name for the next request.
VERSION = "x-loradock-version"
# What `auto` chose, and why.
AUTO = b"x-loradock-auto"
# Seconds since this server read the registry last, while it cannot.
REGISTRY_AGE = b"x-loradock-registry-age"
# As W3C's Trace Context Level 2 has it.
SPAN = b"traceresponse"


def version_tag(full: str, version: int | str, tenant: str) -> str:
    """A version of an adapter as its caller may name it; the version 3 is also v3."""
    return f"{short_name(full, tenant)}@v{str(version).removeprefix('v')}"


def labelled(
    start: Message,
    request_id: str,
    version: str,
    trace: RequestTrace | None = None,
    auto: str = "",
    registry_age: float | None = None,
) -> Message:
    """The start of an answer with these, where they are not empty."""
    headers, own = start["headers"], []
    if request_id:
        headers = [header for header in headers if header[0] != REQUEST_ID]  # the engine's, if it gives one
        own.append((REQUEST_ID, request_id.encode()))
    if version:
        own.append((VERSION.encode(), version.encode()))
    if auto:
        own.append((AUTO, auto.encode()))
    if registry_age is not None:
        own.append((REGISTRY_AGE, f"{registry_age:.0f}".encode()))
    if trace and trace.sampled:
        own.append((SPAN, trace.header.encode()))
    return {**start, "headers": [*headers, *own]} if own else start
